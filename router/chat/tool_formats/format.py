"""What every way of writing tool calls says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from router.chat.messages import Tool
from router.chat.reader import Parsing, Reader
from router.chat.telling import Telling

Structure = dict[str, Any]  # a format of a structural tag


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools that an answer may call.

    Attributes:
        is_parallel: several calls may be in one answer.
        special_tokens: of the vocabulary, id by text: a grammar names them as tokens, they are no text to it.
    """

    tools: tuple[Tool, ...]
    is_parallel: bool
    special_tokens: Mapping[str, int]

    def knows(self, name: str) -> bool:
        return any(tool.name == name for tool in self.tools)


class ToolFormat(Protocol):
    """One way of writing tool calls. Pure.

    Attributes:
        name: as the configuration has it.
        evidence: a chat template that holds all of these texts teaches this format.
        marks: what may be a special token in some vocabularies; the parser must see its text.
    """

    @property
    def name(self) -> str: ...
    @property
    def evidence(self) -> tuple[str, ...]: ...
    @property
    def marks(self) -> tuple[str, ...]: ...

    def parse(self, reader: Reader, telling: Telling, offer: Offer) -> Parsing[None]:
        """Read an answer, to its end."""

    def new_id(self, random: str, index: int, name: str) -> str:
        """Return the id of a call to which the model gave none; `random`: letters and digits."""

    def forced(self, offer: Offer) -> Structure | None:
        """Return what makes an answer nothing but calls, with arguments by their schemas; None: there is no such
        grammar."""

    def guided(self, offer: Offer) -> Structure | None:
        """Return what leaves an answer free, but holds the arguments of strict tools to their schemas once a call
        begins; None: there is no such grammar, calls are as the model writes them."""


def openai_id(random: str) -> str:
    return f"call_{random[:24]}"
