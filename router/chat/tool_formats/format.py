"""What every way of writing tool calls says of itself."""

from typing import Protocol


class ToolFormat(Protocol):
    """One way of writing tool calls."""

    @property
    def name(self) -> str: ...
