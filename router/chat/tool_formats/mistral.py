"""Mistral's ways: a mark and a list of JSON objects, and since 2025 a mark, the bare name and the arguments."""

import re
from dataclasses import dataclass

from router.chat.reader import Parsing, Reader
from router.chat.telling import Telling
from router.chat.tool_formats.format import Offer, Structure
from router.chat.tool_formats.json_calls import read_arguments, read_calls
from router.chat.tool_formats.structure import calls, dispatched, one_call, quoted, sequence, text

_BEGIN, _CALL_ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_WORD = re.compile(r"[\w.\-]{0,1024}")
_ID_CHARACTERS = 9  # its templates refuse every other number


@dataclass(frozen=True, slots=True)
class Mistral:
    """Both ways are read; `has_names`: the newer is the one to force."""

    name: str
    evidence: tuple[str, ...]
    has_names: bool

    @property
    def marks(self) -> tuple[str, ...]:
        return (_BEGIN, _CALL_ID, _ARGUMENTS)

    def new_id(self, random: str, index: int, name: str) -> str:
        return random[:_ID_CHARACTERS]

    def parse(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[None]:
        while (yield from reader.until((_BEGIN,), telling.content, telling.cut_mark)):
            reader.anchor()
            yield from reader.space()
            if (yield from reader.peek()) in ("[", "{"):
                is_call = yield from read_calls(reader, telling, offer)
            else:
                is_call = yield from self._named(reader, telling)
            telling.leftover(("" if is_call else _BEGIN) + reader.give_back(), reader.has_ended)
        telling.end()

    def _named(self, reader: Reader, telling: Telling) -> Parsing[bool]:
        call_id = ""
        name = yield from reader.word(_WORD)
        if (mark := (yield from reader.literal(_CALL_ID, _ARGUMENTS))) == _CALL_ID:
            call_id = yield from reader.word(_WORD)
            yield from reader.literal(_ARGUMENTS)
        yield from reader.space()
        is_begun = bool(mark) or (yield from reader.peek()) == "{"
        if not name or not is_begun:
            return False
        reader.let_go()
        telling.call(name, call_id)
        if (yield from read_arguments(reader, telling.arguments)):
            telling.end_call()
        return True

    def forced(self, offer: Offer) -> Structure:
        special = offer.special_tokens
        if self.has_names:
            call = one_call(offer, lambda name: f"{_BEGIN}{name}{_ARGUMENTS}", "", is_forced=True)
            return sequence(call, {"type": "star", "content": call}) if offer.is_parallel else call
        return sequence(text(f"{_BEGIN}[", special), self._list(offer, is_forced=True))

    def guided(self, offer: Offer) -> Structure | None:
        if self.has_names:
            content = one_call(offer, lambda name: f"{name}{_ARGUMENTS}", "", is_forced=False)
        else:
            content = sequence(text("[", offer.special_tokens), self._list(offer, is_forced=False))
        return dispatched(_BEGIN, content, offer)

    def _list(self, offer: Offer, *, is_forced: bool) -> Structure:
        call = one_call(offer, lambda name: f'{{"name": {quoted(name)}, "arguments": ', "}", is_forced=is_forced)
        return sequence(calls(call, text(", ", offer.special_tokens), offer), text("]", offer.special_tokens))


MISTRAL_NAMED = Mistral("mistral_named", (_BEGIN, _ARGUMENTS), has_names=True)
MISTRAL = Mistral("mistral", (_BEGIN,), has_names=False)
