"""Asks the policy about one request at a time, and remembers what it answered for later questions."""

import random
from collections import deque
from dataclasses import dataclass

from core.clock import Clock
from core.ids import RequestId, WorkerId
from core.request import GenerateRequest
from router.config import RoutingConfig
from router.fleet import Fleet
from router.policy import Decision, NoCandidate, choose
from router.prompt_hashes import PromptHashes
from router.snapshot import RouteQuery


@dataclass(frozen=True, slots=True)
class ExplainedDecision:
    """A decision with all its candidates, kept in a ring."""

    request_id: RequestId
    decided_at: float
    decision: Decision


class Placer:
    """The policy over the fleet's snapshot of this moment."""

    def __init__(self, config: RoutingConfig, fleet: Fleet, clock: Clock, rng: random.Random) -> None:
        self._config = config
        self._fleet = fleet
        self._clock = clock
        self._rng = rng
        self._decisions: deque[ExplainedDecision] = deque(maxlen=config.explained_decisions)

    def place(
        self,
        request: GenerateRequest,
        hashes: PromptHashes,
        *,
        refused: frozenset[WorkerId],
        reserved_decode: WorkerId | None,
    ) -> Decision | NoCandidate:
        """Choose workers for `request`, or only a prefill worker when `reserved_decode` has accepted."""
        query = RouteQuery(
            num_prompt_tokens=request.num_prompt_tokens,
            max_total_tokens=request.num_prompt_tokens + request.sampling.max_tokens,
            needs_decode=needs_decode(request),
            held_tokens=self._fleet.held_tokens(hashes),
            refused=refused,
            reserved_decode=reserved_decode,
        )
        outcome = choose(self._fleet.snapshot(), query, self._config, self._rng)
        if isinstance(outcome, Decision):
            self._decisions.append(ExplainedDecision(request.request_id, self._clock.now(), outcome))
        return outcome

    def explain(self, request_id: RequestId) -> list[ExplainedDecision]:
        """Return the decisions about a request that are still kept, oldest first."""
        return [one for one in self._decisions if one.request_id == request_id]


def needs_decode(request: GenerateRequest) -> bool:
    """False when the first token is the last."""
    return request.sampling.max_tokens > 1
