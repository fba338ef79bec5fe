"""An answer as it is compared, whoever gave it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

TOLERANCE = 5e-5  # float32, of log-probabilities: chunks and batches of other sizes add in another order


class Scored(NamedTuple):
    """A token with its log-probability, if it was asked for, and the alternatives: (id, log-probability)."""

    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the n answers. `calls`: (name, arguments as JSON) of a chat; then `text` is the content around them."""

    text: str
    tokens: tuple[Scored, ...]
    finish: str
    matched_stop: str | int | None
    num_tokens: int
    calls: tuple[tuple[str, str], ...] = ()

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass(frozen=True, slots=True)
class Answer:
    choices: tuple[Choice, ...]
    num_prompt_tokens: int
    prompt: tuple[Scored, ...] = ()


class Distance(NamedTuple):
    """How two answers differ: in words, or, when there are none, how far log-probabilities are apart at most."""

    problem: str
    logprobs: float


def distance(wanted: Answer, found: Answer) -> Distance:
    """Compare everything: what is no number must be equal, numbers within `TOLERANCE`. Pure."""
    if (len(wanted.choices), wanted.num_prompt_tokens) != (len(found.choices), found.num_prompt_tokens):
        return Distance(f"{found.num_prompt_tokens} prompt tokens, {len(found.choices)} choices", 0.0)
    farthest = 0.0
    for number, (one, other) in enumerate(zip(wanted.choices, found.choices, strict=True)):
        for name in ("token_ids", "text", "finish", "matched_stop", "num_tokens", "calls"):
            if getattr(one, name) != getattr(other, name):
                problem = f"choice {number}: {name}: {getattr(other, name)!r} instead of {getattr(one, name)!r}"
                return Distance(problem, 0.0)
        apart = _apart(one.tokens, other.tokens)
        if apart is None:
            return Distance(f"choice {number}: other log-probabilities", 0.0)
        farthest = max(farthest, apart)
    apart = _apart(wanted.prompt, found.prompt)
    if apart is None:
        return Distance("other log-probabilities of the prompt", 0.0)
    return Distance("", max(farthest, apart))


def _apart(wanted: tuple[Scored, ...], found: tuple[Scored, ...]) -> float | None:
    """Return the largest difference, or None when it is not one of rounding."""
    if len(wanted) != len(found):
        return None
    farthest = 0.0
    for one, other in zip(wanted, found, strict=True):
        if one.token_id != other.token_id or (one.logprob is None) is not (other.logprob is None):
            return None
        if [token_id for token_id, _ in one.alternatives] != [token_id for token_id, _ in other.alternatives]:
            return None
        pairs = [(one.logprob or 0.0, other.logprob or 0.0)]
        pairs += [(a, b) for (_, a), (_, b) in zip(one.alternatives, other.alternatives, strict=True)]
        farthest = max(farthest, *(abs(a - b) if math.isfinite(a - b) else math.inf for a, b in pairs))
    return farthest if farthest <= TOLERANCE else None
