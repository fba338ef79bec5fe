"""Calls with the name in a header between marks, then the arguments: DeepSeek V3 and V3.1, Kimi K2."""

import re
from dataclasses import dataclass

from router.chat.reader import Parsing, Reader, TooLong, at_most
from router.chat.telling import Telling
from router.chat.tool_formats.format import Offer, Structure, openai_id
from router.chat.tool_formats.json_calls import MAX_NAME_CHARACTERS, read_arguments
from router.chat.tool_formats.structure import calls, dispatched, one_call, sequence, text

_NUMBERED = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Headed:
    """A section of calls, each `begin` + `prefix` + header + `middle` + arguments + `suffix` + `end`.

    Attributes:
        separator: between calls, as the model was taught it.
        has_ids: the header is the call's id, `functions.NAME:NUMBER`.
    """

    name: str
    evidence: tuple[str, ...]
    section_begin: str
    section_end: str
    begin: str
    end: str
    middle: str
    prefix: str = ""
    suffix: str = ""
    separator: str = ""
    has_ids: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        marks = (self.section_begin, self.section_end, self.begin, self.end, self.middle.partition("\n")[0])
        return tuple(mark for mark in (*marks, self.prefix.removeprefix("function")) if mark)

    def new_id(self, random: str, index: int, name: str) -> str:
        return f"functions.{name}:{index}" if self.has_ids else openai_id(random)

    def parse(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[None]:
        starts = (self.section_begin, self.begin)
        while mark := (yield from reader.until(starts, telling.content, telling.cut_mark)):
            reader.anchor()
            if mark == self.section_begin:
                yield from reader.space()
            is_call = mark == self.begin or bool((yield from reader.literal(self.begin)))
            is_call = is_call and (yield from self._call(reader, telling))
            rest = reader.give_back()
            if not is_call:
                rest = mark + rest
            while is_call and not rest:
                reader.anchor()
                yield from reader.space()
                match (yield from reader.literal(self.section_end, self.begin)):
                    case self.section_end:
                        reader.let_go()
                        break
                    case self.begin:
                        is_call = yield from self._call(reader, telling)
                        rest = reader.give_back()
                    case _:
                        rest = reader.give_back()
                        break
            telling.leftover(rest, reader.has_ended)
        telling.end()

    def _call(self, reader: Reader, telling: Telling) -> Parsing[bool]:
        if self.prefix:
            yield from reader.literal(self.prefix)
        parts: list[str] = []
        try:
            found = yield from reader.until((self.middle,), at_most(MAX_NAME_CHARACTERS, parts.append))
        except TooLong:
            return False
        header = "".join(parts).strip()
        if not found or not header:
            return False
        reader.let_go()
        name = _NUMBERED.fullmatch(header) if self.has_ids else None
        telling.call(name[1] if name else header, header if self.has_ids else "")
        yield from reader.space()
        if not (yield from read_arguments(reader, telling.arguments)):
            return True
        telling.end_call()
        reader.anchor()
        yield from reader.space()
        if self.suffix:
            yield from reader.literal(self.suffix.strip())
            yield from reader.space()
        if (yield from reader.literal(self.end)):
            reader.let_go()
        return True

    def forced(self, offer: Offer) -> Structure:
        return sequence(text(self.section_begin, offer.special_tokens), self._calls(offer, is_forced=True))

    def guided(self, offer: Offer) -> Structure | None:
        return dispatched(self.section_begin, self._calls(offer, is_forced=False), offer)

    def _calls(self, offer: Offer, *, is_forced: bool) -> Structure:
        special = offer.special_tokens
        call = one_call(offer, self._before, self.suffix + self.end, is_forced=is_forced)
        return sequence(calls(call, text(self.separator, special), offer), text(self.section_end, special))

    def _before(self, name: str) -> str:
        header = f"functions.{name}:0" if self.has_ids else name
        return f"{self.begin}{self.prefix}{header}{self.middle}"


_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_SEPARATOR = "<｜tool▁sep｜>"
DEEPSEEK_V3 = Headed(
    "deepseek_v3",
    (_DEEPSEEK[0], "```json"),
    *_DEEPSEEK,
    middle="\n```json\n",
    prefix=f"function{_SEPARATOR}",
    suffix="\n```",
    separator="\n",
)
DEEPSEEK_V31 = Headed("deepseek_v31", (_DEEPSEEK[0],), *_DEEPSEEK, middle=_SEPARATOR)
KIMI_K2 = Headed(
    "kimi_k2",
    ("<|tool_calls_section_begin|>",),
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    middle="<|tool_call_argument_begin|>",
    has_ids=True,
)
