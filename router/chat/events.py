"""What an answer's text turns out to be, piece by piece."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next piece of the message's content."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next piece of a tool call.

    Attributes:
        index: among the calls of this answer: 0, 1, 2, ...
        id, name: only in the call's first piece; empty in all others.
        arguments: the next piece of the JSON text.
    """

    index: int
    id: str
    name: str
    arguments: str


ChatDelta = ContentDelta | ToolCallDelta
