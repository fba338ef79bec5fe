"""How the served model converses, found once when its tokenizer is loaded."""

from dataclasses import dataclass

from router.chat.tool_formats.format import ToolFormat


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """Attributes:
    tool_format: how the model writes calls; None: its template shows it no tools.
    """

    has_template: bool
    tool_format: ToolFormat | None = None
