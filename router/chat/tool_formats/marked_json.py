"""JSON calls between marks, anywhere in the text: hermes (Qwen, tandem-tiny), Granite, Phi."""

from dataclasses import dataclass

from router.chat.reader import Parsing, Reader
from router.chat.telling import Telling
from router.chat.tool_formats.format import Offer, Structure, openai_id
from router.chat.tool_formats.json_calls import read_call, read_calls
from router.chat.tool_formats.structure import calls, dispatched, one_call, quoted, sequence, text


@dataclass(frozen=True, slots=True)
class MarkedJson:
    """`begin`, one object or a list of objects, `end`.

    Attributes:
        end: may be left out by the model; empty: there is none.
        space: between marks and JSON, as the model was taught it.
        is_list: one pair of marks for all calls, which are a list; else a pair for each.
    """

    name: str
    evidence: tuple[str, ...]
    begin: str
    end: str
    space: str = ""
    is_list: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (self.begin, self.end) if mark)

    def new_id(self, random: str, index: int, name: str) -> str:
        return openai_id(random)

    def parse(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[None]:
        while (yield from reader.until((self.begin,), telling.content, telling.cut_mark)):
            reader.anchor()
            yield from reader.space()
            is_call = yield from read_calls(reader, telling, offer)
            rest = reader.give_back()
            if not is_call:
                rest = self.begin + rest
            while is_call and not rest:
                reader.anchor()
                yield from reader.space()
                if self.end and (yield from reader.literal(self.end)):
                    reader.let_go()
                    break
                is_call = yield from read_call(reader, telling, offer)  # another one between the same marks
                rest = reader.give_back()
            telling.leftover(rest, reader.has_ended)
        telling.end()

    def forced(self, offer: Offer) -> Structure:
        special = offer.special_tokens
        if not self.is_list:
            call = one_call(offer, self._before, f"}}{self.space}{self.end}", is_forced=True)
            return calls(call, text("\n", special), offer)
        return sequence(text(self.begin + self.space + "[", special), self._list(offer, is_forced=True))

    def guided(self, offer: Offer) -> Structure | None:
        special = offer.special_tokens
        if self.is_list:
            content = sequence(text(self.space + "[", special), self._list(offer, is_forced=False))
        else:
            after = f"}}{self.space}{self.end}"
            content = one_call(offer, self._before, after, is_forced=False, skipped=self.begin)
        return dispatched(self.begin, content, offer)

    def _before(self, name: str) -> str:
        return f'{self.begin}{self.space}{{"name": {quoted(name)}, "arguments": '

    def _list(self, offer: Offer, *, is_forced: bool) -> Structure:
        call = one_call(offer, lambda name: f'{{"name": {quoted(name)}, "arguments": ', "}", is_forced=is_forced)
        end = text("]" + self.space + self.end, offer.special_tokens)
        return sequence(calls(call, text(", ", offer.special_tokens), offer), end)


HERMES = MarkedJson("hermes", ("<tool_call>",), "<tool_call>", "</tool_call>", "\n")
GRANITE = MarkedJson("granite", ("<|tool_call|>",), "<|tool_call|>", "", is_list=True)
PHI4_MINI = MarkedJson("phi4_mini", ("<|tool|>", "<|/tool|>"), "<|tool_call|>", "<|/tool_call|>", is_list=True)
