"""Asks the policy about one request at a time, and remembers what it answered for later questions."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from core.clock import Clock
from core.ids import RequestId, WorkerId
from core.request import GenerateRequest
from core.service_class import NO_SLO, Slo
from router.explain.ring import ExplanationRing
from router.index.prefix_index import PrefixIndex
from router.prompt_hashes import PromptHashes
from router.routing.baselines import make_policy
from router.routing.config import RoutingConfig
from router.routing.decision import Decision, NoCandidate
from router.routing.held import held_prefixes
from router.routing.links import LinkModel
from router.routing.query import NO_SESSION, RouteQuery, Session
from router.routing.table import WorkerTable


class Placer:
    """The policy over the table of this moment.

    Concurrency: one thread.
    """

    def __init__(
        self,
        config: RoutingConfig,
        clock: Clock,
        rng: random.Random,
        table: WorkerTable,
        links: LinkModel,
        index: PrefixIndex,
        staleness: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._table = table
        self._index = index
        self._staleness = staleness
        self._policy = make_policy(config, links)
        self.explanations = ExplanationRing(config.explained_bytes)

    def place(
        self,
        request: GenerateRequest,
        hashes: PromptHashes,
        *,
        expected_output_tokens: int,
        waited_s: float = 0.0,
        slo: Slo = NO_SLO,
        refused: frozenset[WorkerId] = frozenset(),
        reserved_decode: WorkerId | None = None,
        session: Session = NO_SESSION,
        allow_late: bool = True,
    ) -> Decision | NoCandidate:
        """Choose workers for `request`, or only a prefill worker when `reserved_decode` has accepted."""
        query = self._query(
            request, hashes, slo, expected_output_tokens, waited_s=waited_s, refused=refused,
            reserved_decode=reserved_decode, session=session, allow_late=allow_late,
        )  # fmt: skip
        return self._decide(request.request_id, query)

    def place_decode(
        self,
        request: GenerateRequest,
        hashes: PromptHashes,
        *,
        prefill: WorkerId,
        remaining_prefill_s: float,
        expected_output_tokens: int,
        waited_s: float = 0.0,
        slo: Slo = NO_SLO,
        refused: frozenset[WorkerId] = frozenset(),
        session: Session = NO_SESSION,
    ) -> Decision | NoCandidate:
        """Choose the decode worker of a prompt that `prefill` computes already, for so much longer."""
        query = self._query(
            request, hashes, slo, expected_output_tokens, waited_s=waited_s, refused=refused,
            bound_prefill=prefill, remaining_prefill_s=remaining_prefill_s, session=session,
        )  # fmt: skip
        return self._decide(request.request_id, query)

    def forecast(
        self,
        request: GenerateRequest,
        hashes: PromptHashes,
        *,
        expected_output_tokens: int,
        slo: Slo = NO_SLO,
    ) -> Decision | NoCandidate:
        """Answer as `place` would, for admission: nothing is remembered, since nothing will be sent by it."""
        query = self._query(request, hashes, slo, expected_output_tokens)
        return self._policy.choose(self._table, query, self._rng)

    def _query(
        self,
        request: GenerateRequest,
        hashes: PromptHashes,
        slo: Slo,
        expected_output_tokens: int,
        **fields: Any,
    ) -> RouteQuery:
        num_prompt_tokens = request.num_prompt_tokens
        return RouteQuery(
            num_prompt_tokens,
            num_prompt_tokens + request.sampling.max_tokens,
            held_prefixes(self._index, self._table, hashes),
            self._clock.now(),
            needs_decode=needs_decode(request),
            reuses_prefix=request.sampling.prompt_logprobs is None,
            expected_output_tokens=expected_output_tokens,
            slo=slo,
            quality_floor=request.kv_quality_floor,
            staleness_s=self._staleness(),
            **fields,
        )

    def _decide(self, request_id: RequestId, query: RouteQuery) -> Decision | NoCandidate:
        started = time.perf_counter()
        outcome = self._policy.choose(self._table, query, self._rng)
        if isinstance(outcome, NoCandidate):
            return outcome
        decision = replace(outcome, decision_s=time.perf_counter() - started)
        self.explanations.add(request_id, decision, query.now, query.num_prompt_tokens, query.expected_output_tokens)
        return decision


def needs_decode(request: GenerateRequest) -> bool:
    """False when the first token is the last."""
    return request.sampling.max_tokens > 1
