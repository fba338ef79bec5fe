"""Answers that are JSON calls from their beginning, without marks that must be there: Llama 3, and plain lists.

Any JSON could be an answer, too; so only objects that name a tool on offer are calls."""

from dataclasses import dataclass

from router.chat.reader import Parsing, Reader
from router.chat.telling import Telling
from router.chat.tool_formats.format import Offer, Structure, openai_id
from router.chat.tool_formats.json_calls import read_call, read_calls
from router.chat.tool_formats.structure import (
    calls,
    either,
    one_call,
    quoted,
    sequence,
    text,
    text_not_beginning,
)


@dataclass(frozen=True, slots=True)
class BareJson:
    """Objects one after the other, or a list of them.

    Attributes:
        begin: a mark that models put before calls now and then; empty: there is none.
        key: of the arguments.
        separator: between objects; empty: they are a list.
    """

    name: str
    evidence: tuple[str, ...]
    begin: str
    key: str
    separator: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.begin,) if self.begin else ()

    def new_id(self, random: str, index: int, name: str) -> str:
        return openai_id(random)

    def parse(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[None]:
        reader.anchor()
        yield from reader.space()
        if self.begin:
            yield from reader.literal(self.begin)
            yield from reader.space()
        is_call = yield from read_calls(reader, telling, offer, known_only=True)
        rest = reader.give_back()
        while is_call and not rest:
            reader.anchor()
            yield from reader.space()
            yield from reader.literal(";", ",")
            yield from reader.space()
            is_call = yield from read_call(reader, telling, offer, known_only=True)
            rest = reader.give_back()
        telling.leftover(rest, reader.has_ended)
        yield from reader.rest(telling.content)
        telling.end()

    def forced(self, offer: Offer) -> Structure:
        return self._calls(offer, is_forced=True)

    def guided(self, offer: Offer) -> Structure | None:
        return either([self._calls(offer, is_forced=False), text_not_beginning("{[<")])

    def _calls(self, offer: Offer, *, is_forced: bool) -> Structure:
        special = offer.special_tokens
        call = one_call(offer, self._before, "}", is_forced=is_forced)
        if self.separator:
            return calls(call, text(self.separator, special), offer)
        return sequence(text("[", special), calls(call, text(", ", special), offer), text("]", special))

    def _before(self, name: str) -> str:
        return f'{{"name": {quoted(name)}, {quoted(self.key)}: '


LLAMA3_JSON = BareJson("llama3_json", ('"parameters": dictionary',), "<|python_tag|>", "parameters", "; ")
JSON = BareJson("json", (), "", "arguments")
