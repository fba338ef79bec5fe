"""The last decisions of one gateway with their candidates and outcomes, bounded in bytes, found by request."""

from collections import deque
from dataclasses import dataclass
from itertools import islice

from core.ids import RequestId
from router.explain.outcome import Hindsight, RouteOutcome, judge
from router.routing.decision import Decision

_RECORD_BYTES = 1_400
"""Of one explanation beside its array of candidates: objects of the decision, place in the ring. Rounded up."""


@dataclass(slots=True)
class ExplainedDecision:
    """One choice of workers. `outcome` is None while the request runs, or when the decision was not carried out."""

    request_id: RequestId
    decided_at: float
    decision: Decision
    num_prompt_tokens: int
    expected_output_tokens: int
    outcome: RouteOutcome | None = None

    @property
    def num_bytes(self) -> int:
        return _RECORD_BYTES + 2 * len(self.request_id) + self.decision.ranked.num_bytes

    def hindsight(self) -> Hindsight | None:
        """Return how right it was; None before the outcome, and for what failed."""
        if self.outcome is None or self.outcome.failure:
            return None
        return judge(self.decision, self.outcome, self.expected_output_tokens)


class ExplanationRing:
    """Concurrency: one thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._ring: deque[ExplainedDecision] = deque()
        self._of_request: dict[RequestId, list[ExplainedDecision]] = {}

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def num_bytes(self) -> int:
        """Estimated memory."""
        return self._num_bytes

    def add(
        self,
        request_id: RequestId,
        decision: Decision,
        now: float,
        num_prompt_tokens: int,
        expected_output_tokens: int,
    ) -> None:
        one = ExplainedDecision(request_id, now, decision, num_prompt_tokens, expected_output_tokens)
        self._ring.append(one)
        self._of_request.setdefault(request_id, []).append(one)
        self._num_bytes += one.num_bytes
        while self._num_bytes > self._max_bytes:
            self._drop_oldest()

    def observed(self, request_id: RequestId, outcome: RouteOutcome) -> ExplainedDecision | None:
        """Note what came of a request: of its last decision, the one that was carried out; return it if it is kept."""
        known = self._of_request.get(request_id)
        if known is None or known[-1].outcome is not None:  # of a request before this one that had the same id
            return None
        known[-1].outcome = outcome
        return known[-1]

    def of(self, request_id: RequestId) -> list[ExplainedDecision]:
        """Return the decisions about a request that are still kept, oldest first."""
        return list(self._of_request.get(request_id, ()))

    def last(self, count: int) -> list[ExplainedDecision]:
        """Return the newest ones, newest first."""
        return list(islice(reversed(self._ring), count))

    def check(self) -> None:
        """Assert that the bound holds and that both ways to find a decision agree."""
        assert self._num_bytes <= self._max_bytes
        assert self._num_bytes == sum(one.num_bytes for one in self._ring)
        assert sum(len(known) for known in self._of_request.values()) == len(self._ring)
        assert all(self._of_request.values())

    def _drop_oldest(self) -> None:
        oldest = self._ring.popleft()
        self._num_bytes -= oldest.num_bytes
        known = self._of_request[oldest.request_id]
        known.pop(0)
        if not known:
            del self._of_request[oldest.request_id]
