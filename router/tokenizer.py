"""Text to token ids and back, by the checkpoint's own tokenizer. The gateway's only importer of transformers.

Encoding goes through the fast tokenizer's core directly: transformers' wrapper changes its truncation state on every
call, which breaks when two threads encode at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from core.errors import ConfigError, InvalidRequest


class ChatTurn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


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

    def __init__(self, core: Tokenizer, wrapper: Any) -> None:
        self._core = core
        self._wrapper = wrapper
        self._texts: dict[int, str] = {}

    @classmethod
    def load(cls, path: Path) -> "GatewayTokenizer":
        """Read the tokenizer files of a checkpoint folder. Takes up to seconds.

        Raises:
            ConfigError: no such folder, or no tokenizer in it that has a fast implementation.
        """
        if not path.is_dir():
            raise ConfigError(f"model path {path}: no such folder")
        try:
            wrapper = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model path {path}: cannot load the tokenizer: {_first_line(error)}") from error
        core = getattr(wrapper, "backend_tokenizer", None)
        if core is None:
            raise ConfigError(f"model path {path}: the tokenizer has no fast implementation")
        core.no_truncation()
        core.no_padding()
        return cls(core, wrapper)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._wrapper.chat_template)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a plain prompt, with the markers that the tokenizer puts around one."""
        return list(self._core.encode(text).ids)

    def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """Render the chat template, up to where the model begins to answer, and encode it.

        Raises:
            InvalidRequest: there is no template, or it refuses these messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest("chat", "this model has no chat template; send text or token_ids")
        messages = [turn._asdict() for turn in turns]
        try:
            text = self._wrapper.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequest("chat", f"the chat template refuses it: {_first_line(error)}") from error
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self._core.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """Return one token as text, special tokens spelled out, U+FFFD for broken characters. Remembered."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = str(self._core.decode([token_id], skip_special_tokens=False))
        return text


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
