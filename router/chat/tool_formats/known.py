"""The ways of writing tool calls that are known here, and how a model's is found. Pure."""

from typing import Literal, get_args

from router.chat.tool_formats.bare_json import JSON, LLAMA3_JSON
from router.chat.tool_formats.format import ToolFormat
from router.chat.tool_formats.headed import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2
from router.chat.tool_formats.marked_json import GRANITE, HERMES, PHI4_MINI
from router.chat.tool_formats.mistral import MISTRAL, MISTRAL_NAMED
from router.chat.tool_formats.pythonic import LLAMA4_PYTHONIC, PYTHONIC
from router.chat.tool_formats.tagged import GLM45, QWEN3_CODER

ToolFormatName = Literal[
    "auto",
    "deepseek_v3",
    "deepseek_v31",
    "glm45",
    "granite",
    "hermes",
    "json",
    "kimi_k2",
    "llama3_json",
    "llama4_pythonic",
    "mistral",
    "mistral_named",
    "phi4_mini",
    "pythonic",
    "qwen3_coder",
]
# In the order in which a template's evidence is looked for: what holds another's evidence, too, comes first.
_FORMATS: tuple[ToolFormat, ...] = (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    KIMI_K2,
    MISTRAL_NAMED,
    MISTRAL,
    QWEN3_CODER,
    GLM45,
    HERMES,
    PHI4_MINI,
    GRANITE,
    LLAMA4_PYTHONIC,
    PYTHONIC,
    LLAMA3_JSON,
    JSON,
)
FORMATS = {one.name: one for one in _FORMATS}
assert sorted(FORMATS) == sorted(set(get_args(ToolFormatName)) - {"auto"})


def find_format(template: str) -> ToolFormat | None:
    """Return the format that a template teaches its model; None: none that is known."""
    for one in _FORMATS:
        if one.evidence and all(text in template for text in one.evidence):
            return one
    return None
