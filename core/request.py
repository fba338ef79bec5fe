"""A request for tokens and what comes back, as every layer below the gateway sees it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from core.constraint import Constraint
from core.ids import RequestId
from core.kv_quality import EXACT
from core.violations import Violations

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_SEED = 2**64
MIN_TEMPERATURE = 1e-3  # below, one token has all the probability anyway, and float32 would not know it from 0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Validated by `check`; the defaults sample the plain distribution.

    Attributes:
        temperature: 0 means greedy (arg max, lowest id wins ties); otherwise logits are divided by it; [0.001, 100].
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches this; (0, 1].
        min_p: keep tokens at least this fraction as probable as the most probable one; [0, 1].
        presence_penalty: subtracted once from the logit of every token generated so far; [-2, 2].
        frequency_penalty: subtracted per occurrence among the generated tokens; [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of every token seen in the prompt or
            the output; [0.01, 100], 1 is off.
        logit_bias: added to the logits of these token ids; each within [-100, 100]; at most 1024.
        stop: generation ends when the text contains one of these; the match itself is not returned. At most 16 of at
            most 1024 characters.
        stop_token_ids: at most 1024; generation ends after one of these (it is returned, as token, not as text).
        ignore_eos: the model's end-of-sequence tokens do not end the generation.
        min_tokens: end-of-sequence and stop tokens are suppressed before this many tokens.
        max_tokens: at most this many tokens; >= 1.
        seed: the sample at position i depends only on (seed, i, logits at i).
        logprobs: None for none; otherwise the log-probability of each chosen token (of the distribution before
            temperature and filters, after penalties and bias) and this many most probable alternatives.
        prompt_logprobs: None for none; otherwise the same of every prompt token but the first, of the model's own
            distribution.
        constraint: what the text must be; None: anything.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 16
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None

    def check(self, vocab_size: int) -> None:
        """Check every range. Pure.

        Raises:
            InvalidRequest: naming every offending field as ``sampling.<name>``.
        """
        found = Violations()
        if self.temperature != 0.0:
            _within(found, "temperature", self.temperature, MIN_TEMPERATURE, 100.0, instead="0 (greedy) or ")
        _within(found, "top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within(found, "min_p", self.min_p, 0.0, 1.0)
        _within(found, "presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within(found, "frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within(found, "repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _within(found, "top_k", self.top_k, 0, math.inf)
        _within(found, "max_tokens", self.max_tokens, 1, math.inf)
        _within(found, "min_tokens", self.min_tokens, 0, max(1, self.max_tokens))
        _within(found, "seed", self.seed, 0, MAX_SEED - 1)
        if self.logprobs is not None:
            _within(found, "logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _within(found, "prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            found.add("sampling.stop", f"at most {MAX_STOP_STRINGS} stop strings")
        elif any(not text for text in self.stop):
            found.add("sampling.stop", "a stop string must not be empty")
        elif any(len(text) > MAX_STOP_CHARACTERS for text in self.stop):
            found.add("sampling.stop", f"a stop string has at most {MAX_STOP_CHARACTERS} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            found.add("sampling.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} token ids")
        elif self.stop_token_ids:
            _within(found, "stop_token_ids", _worst(self.stop_token_ids, vocab_size), 0, vocab_size - 1)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            found.add("sampling.logit_bias", f"at most {MAX_LOGIT_BIASES} entries")
        elif self.logit_bias:
            _within(found, "logit_bias", _worst(self.logit_bias, vocab_size), 0, vocab_size - 1)
            for bias in self.logit_bias.values():
                if not -100.0 <= bias <= 100.0:
                    _within(found, "logit_bias", bias, -100.0, 100.0)
                    break
        found.check()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _worst(token_ids: Iterable[int], vocab_size: int) -> int:
    """Return an id that is not in the vocabulary, or any. Pure."""
    return next((one for one in token_ids if not 0 <= one < vocab_size), 0)


def _within(
    found: Violations, name: str, value: float, low: float, high: float, *, low_open: bool = False, instead: str = ""
) -> None:
    """Note what is not a finite number between the two; `instead` names what else is allowed."""
    is_finite = isinstance(value, int) or math.isfinite(value)  # of a whole number beyond all floats it cannot be asked
    if not is_finite or value > high or value < low or (low_open and value == low):
        left, right = "(" if low_open else "[", "]" if math.isfinite(high) else ")"
        found.add(f"sampling.{name}", f"must be {instead}in {left}{low:g}, {high:g}{right}, got {value!r}")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate.

    Attributes:
        prompt_token_ids: at least one.
        block_hashes: chained hash of each FULL prompt block (`core.blocks.block_hashes`), computed once by the
            gateway over the cluster's block size; empty means that the engine computes them.
        tenant: on whose account; part of the hash namespace, too.
        adapter: part of the hash namespace.
        shared_salt: in place of the tenant in the hash namespace, of tenants that share prefix caches; empty: none.
        kv_quality_floor: of the profile that its KV may be transferred under (`core.kv_quality`); 1 is lossless.
        handoff_budget_s: the KV may arrive so long after the first token; None: as soon as it can.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    block_hashes: tuple[bytes, ...] = ()
    tenant: str = ""
    adapter: str = ""
    shared_salt: str = ""
    kv_quality_floor: float = EXACT
    handoff_budget_s: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def cache_salt(self) -> str:
        """What separates its prefix cache from others'."""
        return self.shared_salt or self.tenant


class FinishReason(StrEnum):
    """Why a stream ended well. Failures are errors, not finish reasons."""

    STOP = "stop"  # end of sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a stream. `matched_stop` is the stop string or the stop/eos token id that ended it."""

    reason: FinishReason
    matched_stop: str | int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """An alternative at some position."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token. `index` counts from 0 over the whole generation, across workers."""

    index: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of the prompt, scored. `logprob` is None for the first: nothing came before it."""

    token_id: int
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one engine step produced for one request: new tokens, and the end if it came.

    Attributes:
        prompt_tokens: with the first token, the scored prompt when `prompt_logprobs` asked for it.
    """

    request_id: RequestId
    tokens: tuple[TokenOutput, ...]
    finish: Finish | None = None
    prompt_tokens: tuple[PromptToken, ...] = ()
