"""Decides after every token whether a generation is over. One small object per request; knows no batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.request import Finish, FinishReason, SamplingParams
from core.text import PROMPT_TAIL_TOKENS, NewDetokenizer, StopScanner


@dataclass(frozen=True, slots=True)
class TextStops:
    """Stop strings need text, so the tokenizer's detokenizer and the end of the prompt come with them."""

    new_detokenizer: NewDetokenizer
    prompt_token_ids: Sequence[int]


class StopChecker:
    """Feed it every generated token in order.

    A stop token, the model's end of sequence or a stop string ends with STOP and wins over a length limit reached by
    the same token. End tokens below `min_tokens` cannot come: the sampler suppresses them.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        max_new_tokens: int,
        end_token_ids: Sequence[int],
        text: TextStops | None = None,
    ) -> None:
        """
        Args:
            max_new_tokens: `max_tokens`, or what the model's context leaves if that is less.
            end_token_ids: stop tokens and, unless ignored, the model's end-of-sequence tokens.
            text: given if and only if there are stop strings.
        """
        assert bool(params.stop) == (text is not None)
        self._left = max_new_tokens
        self._end_token_ids = frozenset(end_token_ids)
        self._scanner = StopScanner(params.stop)
        self._detokenizer = text.new_detokenizer(text.prompt_token_ids[-PROMPT_TAIL_TOKENS:]) if text else None

    def push(self, token_id: int) -> Finish | None:
        """Take the next token; return the end if it is one."""
        self._left -= 1
        if token_id in self._end_token_ids:
            return Finish(FinishReason.STOP, token_id)
        if self._detokenizer is not None:
            self._scanner.push(self._detokenizer.push((token_id,)))
            if self._scanner.matched is not None:
                return Finish(FinishReason.STOP, self._scanner.matched)
        if self._left <= 0:
            return Finish(FinishReason.LENGTH)
        return None
