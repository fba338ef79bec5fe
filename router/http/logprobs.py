"""Log-probabilities in the shapes of the three APIs that tell them: chat, completions, and vLLM's prompt_logprobs.

Pure; no shape ever holds a number that JSON lacks: an impossible token's minus infinity becomes -9999, as OpenAI has
it."""

import codecs
from collections.abc import Sequence
from typing import Any

from core.request import PromptToken, TokenLogprob, TokenOutput
from router.tokenizer import GatewayTokenizer

_IMPOSSIBLE = -9999.0
Json = dict[str, Any]


class TokenNames:
    """How tokens are called.

    Args:
        as_ids: as `token_id:<id>` instead of their text.
    """

    def __init__(self, tokenizer: GatewayTokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        return (
            f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_bytes(token_id).decode(errors="replace")
        )

    def bytes_of(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def is_text(self, token_id: int) -> bool:
        """Whether it is part of the text, which leaves special tokens out."""
        return not self._tokenizer.is_special(token_id)


def chat_logprobs(tokens: Sequence[TokenOutput], names: TokenNames) -> list[Json]:
    """`choices[].logprobs.content`."""
    return [
        {
            **_chat_token(names, token.token_id, token.logprob),
            "top_logprobs": [_chat_token(names, one.token_id, one.logprob) for one in token.top_logprobs],
        }
        for token in tokens
    ]


def _chat_token(names: TokenNames, token_id: int, logprob: float | None) -> Json:
    return {"token": names.name(token_id), "logprob": _finite(logprob), "bytes": list(names.bytes_of(token_id))}


class CompletionLogprobs:
    """`choices[].logprobs` of one completion, piece by piece: offsets go on from piece to piece.

    Args:
        num_top: so many alternatives are told, of those that there are.
    """

    def __init__(self, names: TokenNames, num_top: int) -> None:
        self._names = names
        self._num_top = num_top
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def of(self, tokens: Sequence[TokenOutput | PromptToken]) -> Json:
        """Return what tells of the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            if self._names.is_text(token.token_id):
                self._offset += len(self._characters.decode(self._names.bytes_of(token.token_id)))
        return {
            "tokens": [self._names.name(token.token_id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: TokenOutput | PromptToken) -> dict[str, float] | None:
        """The most probable tokens, and the one that is there in any case. Tokens of one name: the more probable."""
        if token.logprob is None:
            return None
        told: dict[str, float] = {}
        for one in (*token.top_logprobs[: self._num_top], TokenLogprob(token.token_id, token.logprob)):
            told.setdefault(self._names.name(one.token_id), _finite(one.logprob))
        return told


def prompt_logprobs(tokens: Sequence[PromptToken], names: TokenNames, num_top: int) -> list[dict[str, Json] | None]:
    """vLLM's `prompt_logprobs`: per token, by token id, the token itself and the most probable ones. `rank`: among the
    most probable ones that are told, from 1; null beyond."""
    told: list[dict[str, Json] | None] = []
    for token in tokens:
        if token.logprob is None:
            told.append(None)
            continue
        top = token.top_logprobs[:num_top]
        entry: dict[str, Json] = {
            str(one.token_id): {
                "logprob": _finite(one.logprob),
                "rank": rank,
                "decoded_token": names.name(one.token_id),
            }
            for rank, one in enumerate(top, start=1)
        }
        own = {"logprob": _finite(token.logprob), "rank": None, "decoded_token": names.name(token.token_id)}
        entry.setdefault(str(token.token_id), own)
        told.append(entry)
    return told


def _finite(logprob: float | None) -> float:
    return _IMPOSSIBLE if logprob is None else max(logprob, _IMPOSSIBLE)
