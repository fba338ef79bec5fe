"""Text to token ids and back, by the checkpoint's own tokenizer.json; chats through the checkpoint's template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError, InvalidRequest
from core.text import Detokenizer
from core.vocabulary import Vocabulary
from router.chat.json_text import read_object
from router.chat.messages import MAX_DEPTH, ChatMessage, Tool
from router.chat.style import ChatStyle, style_of
from router.chat.template import ChatTemplate, read_template
from router.chat.template_values import asks_for_none, template_messages, template_tools
from router.chat.tool_formats.known import ToolFormatName

_MAX_PROMPT_CHARACTERS = 4 * 2**20
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint folder says about its model without loading it."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


class GatewayTokenizer:
    """A checkpoint's tokenizer and chat template.

    Concurrency: all methods may be called from several threads.
    """

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate | None, style: ChatStyle) -> None:
        self._vocabulary = vocabulary
        self._template = template
        self.chat_style = style
        self._with_none = template is not None and asks_for_none(template.text_for_tools)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        chat_template: Path | None = None,
        tool_format: ToolFormatName = "auto",
        max_prompt_characters: int = _MAX_PROMPT_CHARACTERS,
    ) -> "GatewayTokenizer":
        """Read the tokenizer files of a checkpoint folder. Takes up to seconds.

        Args:
            chat_template: a file that replaces the checkpoint's own template.
            tool_format: how the model writes tool calls; auto: as its template teaches it.
            max_prompt_characters: of a rendered chat.

        Raises:
            ConfigError: no such folder, no tokenizer.json in it, or something in it is broken.
        """
        if not path.is_dir():
            raise ConfigError(f"model path {path}: no such folder")
        vocabulary = Vocabulary.load(path / "tokenizer.json")
        config = _read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
        source = read_template(path, config, chat_template)
        special_tokens = vocabulary.special_tokens
        if source is None:
            return cls(vocabulary, None, style_of(None, special_tokens, tool_format))
        template = ChatTemplate(source, _special_tokens(path, config), max_characters=max_prompt_characters)
        return cls(vocabulary, template, style_of(template, special_tokens, tool_format))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def has_template_variable(self, name: str) -> bool:
        """Return whether the chat template reads a variable of this name."""
        return self._template is not None and self._template.has_variable(name)

    def encode(self, text: str, *, with_markers: bool = True) -> list[int]:
        """Return the ids of a plain prompt; `with_markers`: and those that the tokenizer puts around one."""
        return self._vocabulary.encode(text, with_markers=with_markers)

    def encode_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), template_arguments: str = ""
    ) -> list[int]:
        """Render the chat template, up to where the model begins to answer, and encode it.

        Args:
            template_arguments: a JSON object of further variables, as text; empty: none.

        Raises:
            InvalidRequest: there is no template, it refuses these messages, or the prompt becomes too long.
        """
        text = self.render_chat(messages, tools, template_arguments)
        return self._vocabulary.encode(text, with_markers=False)

    def render_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), template_arguments: str = ""
    ) -> str:
        """Return the text that `encode_chat` encodes."""
        if self._template is None:
            raise InvalidRequest("chat", "this model has no chat template; send text or token_ids")
        arguments = read_object("chat_template_arguments", template_arguments or "{}", MAX_DEPTH)
        return self._template.render(
            template_messages(messages, with_none=self._with_none), template_tools(tools), arguments
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self._vocabulary.decode(token_ids)

    def detokenizer(self, prompt_tail: Sequence[int] = ()) -> Detokenizer:
        """Return one for the ids that follow a prompt which ends with these."""
        return self._vocabulary.detokenizer(prompt_tail)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token is in UTF-8, special tokens spelled out; not always whole characters."""
        return self._vocabulary.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether texts leave this token out."""
        return self._vocabulary.is_special(token_id)

    def token_text(self, token_id: int) -> str:
        """Return one token as text, special tokens spelled out, U+FFFD for broken characters."""
        return self._vocabulary.token_text(token_id)


def read_model_facts(path: Path) -> ModelFacts:
    """Read config.json and, if there, generation_config.json.

    Raises:
        ConfigError: config.json is missing, broken, or lacks the vocabulary or context size.
    """
    config = _read_json(path / "config.json")
    text_config = config.get("text_config", config)
    sizes = {name: text_config.get(name) for name in ("vocab_size", "max_position_embeddings")}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{path / 'config.json'}: {name} is missing or no positive number")
    generation = _read_json(path / "generation_config.json") if (path / "generation_config.json").exists() else {}
    eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return ModelFacts(sizes["vocab_size"], sizes["max_position_embeddings"], tuple(int(one) for one in eos_ids))


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the tokens that have names, for the template."""
    named = _read_json(path / "special_tokens_map.json") if (path / "special_tokens_map.json").exists() else {}
    tokens = {}
    for name in _NAMED_TOKENS:
        token = config.get(name) or named.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: is not a JSON object")
    return data
