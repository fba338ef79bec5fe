"""One request as the policy sees it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.ids import WorkerId
from core.service_class import NO_SLO, Slo


@dataclass(frozen=True, slots=True)
class Session:
    """The workers that served the session last; None: nobody knows."""

    prefill: WorkerId | None = None
    decode: WorkerId | None = None


NO_SESSION = Session()


@dataclass(frozen=True, slots=True)
class HeldPrefixes:
    """What is cached of one prompt.

    Attributes:
        device: float64 [slots], leading prompt tokens that can be used at once.
        host: the same of those that are held in any tier; nowhere less.
        hot_tokens: leading tokens that a good part of recent traffic shares.
        hot_reuses: prompts with those tokens expected within a cache life, over all workers.
    """

    device: NDArray[np.float64]
    host: NDArray[np.float64]
    hot_tokens: int = 0
    hot_reuses: float = 0.0


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """One request to place.

    Attributes:
        max_total_tokens: prompt and everything it may generate.
        expected_output_tokens: steps of decoding that are to be expected.
        needs_decode: False when the first token is the last.
        reuses_prefix: False when the whole prompt is computed whatever is cached of it, as for its log-probabilities.
            What a decode worker holds need not be sent all the same.
        now: clock of the table, seconds.
        allow_late: the decode worker may be chosen while the prompt is computed.
        waited_s: since the request arrived.
        quality_floor: of its KV transfer, in [0, 1].
        refused: workers not to be asked (again) in this round.
        reserved_decode: the decode worker that accepted already; only the prefill worker is open then.
        bound_prefill: the prefill worker that computes already, for `remaining_prefill_s` more; only the decode worker
            is open then.
        staleness_s: age of the shared state behind the table; goes into the decision.
    """

    num_prompt_tokens: int
    max_total_tokens: int
    held: HeldPrefixes
    now: float
    needs_decode: bool = True
    reuses_prefix: bool = True
    allow_late: bool = True
    expected_output_tokens: int = 64
    waited_s: float = 0.0
    slo: Slo = NO_SLO
    quality_floor: float = 1.0
    refused: frozenset[WorkerId] = frozenset()
    reserved_decode: WorkerId | None = None
    bound_prefill: WorkerId | None = None
    remaining_prefill_s: float = 0.0
    session: Session = NO_SESSION
    staleness_s: float = 0.0
