"""How the served model converses, found once when its tokenizer is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.chat.template import ChatTemplate
from router.chat.tool_formats.format import ToolFormat
from router.chat.tool_formats.known import FORMATS, ToolFormatName, find_format


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """A model's manners.

    Attributes:
        shows_tools: the template tells the model of its tools.
        tool_format: how it writes calls; None: not known.
        special_tokens: of the vocabulary: id by text.
    """

    has_template: bool = False
    shows_tools: bool = False
    tool_format: ToolFormat | None = None
    special_tokens: Mapping[str, int] = field(default_factory=dict)

    def special_marks(self, tool_format: ToolFormat) -> dict[str, int]:
        """Return which marks of a format are special tokens here, with their ids."""
        return {mark: self.special_tokens[mark] for mark in tool_format.marks if mark in self.special_tokens}


def style_of(
    template: ChatTemplate | None, special_tokens: Mapping[str, int], tool_format: ToolFormatName
) -> ChatStyle:
    """`tool_format`: auto: as the template teaches it."""
    if template is None:
        return ChatStyle(special_tokens=special_tokens)
    found = find_format(template.text_for_tools) if tool_format == "auto" else FORMATS[tool_format]
    return ChatStyle(True, template.has_variable("tools"), found, special_tokens)
