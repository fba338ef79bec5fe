"""Calls whose arguments are tags, one each: Qwen3-Coder, GLM 4.5.

What is in the tags is not JSON, so no grammar holds it to a schema; a call that must come is forced as plain JSON."""

import re
from dataclasses import dataclass

from router.chat.reader import Parsing, Reader, Take, TooLong, at_most
from router.chat.telling import Telling
from router.chat.tool_formats.format import Offer, Structure, openai_id
from router.chat.tool_formats.json_calls import MAX_NAME_CHARACTERS
from router.chat.tool_formats.typed_arguments import TypedArguments

_WORD = re.compile(r"[\w.\-]{0,1024}")


@dataclass(frozen=True, slots=True)
class Tagged:
    """`begin` name `after_name`, for each argument `key_begin` key `key_end` `value_begin` value `value_end`, `end`.

    Attributes:
        outer: marks around all this, which a model may leave out; None: there are none.
        has_lines: a value has lines of its own: the first and the last line break are not of it.
    """

    name: str
    evidence: tuple[str, ...]
    begin: str
    after_name: str
    key_begin: str
    key_end: str
    value_begin: str
    value_end: str
    end: str
    outer: tuple[str, str] | None = None
    has_lines: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        inner = (self.begin, self.key_begin, self.key_end, self.value_begin, self.value_end, self.end)
        return tuple(mark for mark in (*(self.outer or ()), *inner) if len(mark) > 1)

    def new_id(self, random: str, index: int, name: str) -> str:
        return openai_id(random)

    def parse(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[None]:
        starts = (self.outer[0], self.begin) if self.outer else (self.begin,)
        while mark := (yield from reader.until(starts, telling.content, telling.cut_mark)):
            reader.anchor()
            yield from reader.space()
            is_begun = mark == self.begin or bool((yield from reader.literal(self.begin)))
            is_call = is_begun and (yield from self._call(reader, telling, offer))
            telling.leftover(("" if is_call else mark) + reader.give_back(), reader.has_ended)
        telling.end()

    def _call(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[bool]:
        name = yield from reader.word(_WORD)
        yield from reader.space()
        is_begun = (
            (yield from reader.literal(self.after_name))
            if self.after_name
            else (yield from reader.ahead(self.key_begin, self.end))
        )
        if not name or not is_begun:
            return False
        reader.let_go()
        telling.call(name)
        arguments = TypedArguments(telling, offer, name)
        while True:
            yield from reader.space()
            mark = yield from reader.literal(self.key_begin, self.end)
            if mark == self.end:
                break
            if not mark or not (yield from self._argument(reader, arguments)):
                return True  # cut off, or not as it was taught: told as far as it came
        arguments.end()
        if self.outer is not None:
            reader.anchor()
            yield from reader.space()
            if (yield from reader.literal(self.outer[1])):
                reader.let_go()
        return True

    def _argument(self, reader: Reader, arguments: TypedArguments) -> Parsing[bool]:
        parts: list[str] = []
        try:
            found = yield from reader.until((self.key_end,), at_most(MAX_NAME_CHARACTERS, parts.append))
        except TooLong:
            return False
        key = "".join(parts).strip()
        if not found or not key:
            return False
        if self.value_begin:
            yield from reader.space()
            if not (yield from reader.literal(self.value_begin)):
                return False
        if arguments.is_text(key):
            if not (yield from self._value(reader, arguments.begin_text(key))):
                return False
            arguments.end_text()
            return True
        parts.clear()
        if not (yield from self._value(reader, parts.append)):
            return False
        arguments.written(key, "".join(parts))
        return True

    def _value(self, reader: Reader, take: Take) -> Parsing[bool]:
        if not self.has_lines:
            return bool((yield from reader.until((self.value_end,), take)))
        yield from reader.literal("\n")
        is_whole = False
        while (mark := (yield from reader.until(("\n", self.value_end), take))) == "\n":
            if is_whole := bool((yield from reader.literal(self.value_end))):
                break
            take("\n")
        return is_whole or bool(mark == self.value_end)

    def forced(self, offer: Offer) -> Structure | None:
        return None

    def guided(self, offer: Offer) -> Structure | None:
        return None


QWEN3_CODER = Tagged(
    "qwen3_coder",
    ("<function=", "<parameter="),
    begin="<function=",
    after_name=">",
    key_begin="<parameter=",
    key_end=">",
    value_begin="",
    value_end="</parameter>",
    end="</function>",
    outer=("<tool_call>", "</tool_call>"),
    has_lines=True,
)
GLM45 = Tagged(
    "glm45",
    ("<arg_key>", "<arg_value>"),
    begin="<tool_call>",
    after_name="",
    key_begin="<arg_key>",
    key_end="</arg_key>",
    value_begin="<arg_value>",
    value_end="</arg_value>",
    end="</tool_call>",
)
