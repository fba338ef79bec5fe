"""Calls written as a Python list of calls with keywords: Llama 4, Llama 3.2, and others.

Python is not JSON, so no grammar holds it to a schema; a call that must come is forced as plain JSON."""

import re
from dataclasses import dataclass

from router.chat.reader import Parsing, Reader, TooLong, at_most
from router.chat.telling import Telling
from router.chat.tool_formats.format import Offer, Structure, openai_id
from router.chat.tool_formats.typed_arguments import TypedArguments

_NAME = re.compile(r"[A-Za-z_]?[\w.\-]{0,255}")
_KEYWORD = re.compile(r"[A-Za-z_]\w*\s*=(?!=)")
_MAX_VALUE_CHARACTERS = 1_048_576


@dataclass(frozen=True, slots=True)
class Pythonic:
    """A list at the beginning of the answer, or between the marks; only tools on offer are called."""

    name: str
    evidence: tuple[str, ...]
    begin: str
    end: str

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (self.begin, self.end) if mark)

    def new_id(self, random: str, index: int, name: str) -> str:
        return openai_id(random)

    def parse(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[None]:
        reader.anchor()
        yield from reader.space()
        yield from self._list(reader, telling, offer)
        telling.leftover(reader.give_back(), reader.has_ended)
        if not self.begin:
            yield from reader.rest(telling.content)
        while self.begin and (yield from reader.until((self.begin,), telling.content, telling.cut_mark)):
            reader.anchor()
            yield from reader.space()
            is_call = yield from self._list(reader, telling, offer)
            telling.leftover(("" if is_call else self.begin) + reader.give_back(), reader.has_ended)
        telling.end()

    def _list(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[bool]:
        has_calls = False
        if not (yield from reader.literal("[")):
            return False
        while True:
            yield from reader.space()
            if not (yield from self._call(reader, telling, offer)):
                return has_calls
            has_calls = True
            reader.anchor()
            yield from reader.space()
            mark = yield from reader.literal(",", "]")
            if mark != ",":
                break
        if mark:
            yield from reader.space()
            if self.end:
                yield from reader.literal(self.end)
            reader.let_go()
        return True

    def _call(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[bool]:
        name = yield from reader.word(_NAME)
        if not offer.knows(name) or not (yield from reader.literal("(")):
            return False
        reader.let_go()
        telling.call(name)
        arguments = TypedArguments(telling, offer, name)
        position = 0
        while True:
            parts: list[str] = []
            try:
                mark = yield from reader.python_value(at_most(_MAX_VALUE_CHARACTERS, parts.append))
            except TooLong:
                return True
            text = "".join(parts).strip()
            if not mark:
                return True  # cut off: told as far as it came
            if found := _KEYWORD.match(text):
                arguments.literal(found[0][:-1].strip(), text[found.end() :])
            elif text:
                arguments.literal(arguments.name_at(position), text)
                position += 1
            if mark == ")":
                break
        arguments.end()
        return True

    def forced(self, offer: Offer) -> Structure | None:
        return None

    def guided(self, offer: Offer) -> Structure | None:
        return None


LLAMA4_PYTHONIC = Pythonic("llama4_pythonic", ("<|python_start|>",), "<|python_start|>", "<|python_end|>")
PYTHONIC = Pythonic("pythonic", ("[func_name1(",), "", "")
