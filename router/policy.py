"""Filter, score, pick: which prefill worker and which decode worker take a request. Pure over a frozen snapshot.

1. Filter: role, ready, connected to this very incarnation, long enough context, not refused this request in this
   round.
2. Score: the cheapest few of each role are paired, and every pair with the same KV layout gets one cost in seconds
   (`router.cost`). Terms of one worker decide who is among those few, so the pools may be large: the work per
   decision is linear in the workers and bounded in the pairs.
3. Pick: the cheapest, or a softmax draw at temperature > 0. Ties are broken by the given generator, never by order.

The estimate only orders the candidates; the worker's own accept or reject is the truth.
"""

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from core.ids import WorkerId
from core.membership import Role
from router.config import RoutingConfig
from router.cost import Candidate, CostTerms, decode_s, prefill_s, queue_s, transfer_s
from router.snapshot import ClusterSnapshot, RouteQuery, WorkerView

_TIE_S = 1e-9


class PickReason(StrEnum):
    """Why the winner won."""

    ONLY = "only_candidate"
    PREFIX = "prefix_hit"  # cheapest, and it holds more of the prompt than any other prefill candidate
    CHEAPEST = "cheapest"
    TIE = "tie"  # as cheap as another; drawn
    SAMPLED = "sampled"  # drawn by temperature, and not the cheapest


class Obstacle(StrEnum):
    """Why a worker of the wanted role is no candidate; also why there is none at all (then the mildest of them)."""

    TOO_LONG = "too_long"  # its context is shorter than the request may become
    REFUSED = "refused"  # it said no in this round
    LAYOUT = "layout"  # no partner has its KV layout
    NOT_LIVE = "not_live"  # not ready, or no stream to this incarnation
    ABSENT = "absent"  # no such worker is known


@dataclass(frozen=True, slots=True)
class Decision:
    """A placement with everything it was weighed against, cheapest first."""

    winner: Candidate
    reason: PickReason
    candidates: tuple[Candidate, ...]
    staleness_s: float


@dataclass(frozen=True, slots=True)
class NoCandidate:
    """Nobody can be asked now. `role` is the one that is missing."""

    role: Role
    obstacle: Obstacle


def choose(
    snapshot: ClusterSnapshot, query: RouteQuery, config: RoutingConfig, rng: random.Random
) -> Decision | NoCandidate:
    """Place one request. Pure but for the draw; the order of `snapshot.workers` does not matter."""
    workers = sorted(snapshot.workers, key=lambda worker: worker.worker_id)
    prefills = _eligible(workers, query, Role.PREFILL)
    if isinstance(prefills, NoCandidate):
        return prefills
    if not query.needs_decode:
        cheapest = _cheapest(prefills, lambda worker: _prefill_cost(worker, query), config, rng)
        return _pick([_alone(worker, query) for worker in cheapest], query, snapshot, config, rng)
    decodes = _eligible(workers, query, Role.DECODE)
    if isinstance(decodes, NoCandidate):
        return decodes
    layouts = {worker.layout_fingerprint for worker in prefills} & {worker.layout_fingerprint for worker in decodes}
    candidates: list[Candidate] = []
    for layout in sorted(layouts):
        candidates += _pairs(
            _cheapest(_of(prefills, layout), lambda worker: _prefill_cost(worker, query), config, rng),
            _cheapest(_of(decodes, layout), lambda worker: _decode_cost(snapshot, worker, query, config), config, rng),
            snapshot,
            query,
            config,
        )
    if not candidates:
        return NoCandidate(Role.PREFILL if query.reserved_decode else Role.DECODE, Obstacle.LAYOUT)
    return _pick(candidates, query, snapshot, config, rng)


def obstacle(worker: WorkerView, query: RouteQuery) -> Obstacle | None:
    """Return why `worker` cannot be asked, or None when it can. A decode worker that accepted stays eligible."""
    if worker.worker_id == query.reserved_decode:
        return None
    if not worker.is_live:
        return Obstacle.NOT_LIVE
    if worker.worker_id in query.refused:
        return Obstacle.REFUSED
    if 0 < worker.max_model_len < query.max_total_tokens:
        return Obstacle.TOO_LONG
    return None


def _eligible(workers: Sequence[WorkerView], query: RouteQuery, role: Role) -> list[WorkerView] | NoCandidate:
    found = []
    obstacles = set()
    for worker in workers:
        if worker.role is not role:
            continue
        if role is Role.DECODE and query.reserved_decode not in (None, worker.worker_id):
            continue
        problem = obstacle(worker, query)
        if problem is None:
            found.append(worker)
        else:
            obstacles.add(problem)
    if found:
        return found
    # REFUSED before TOO_LONG: a worker that is busy now can take it later, so the request is worth keeping.
    for problem in (Obstacle.REFUSED, Obstacle.TOO_LONG, Obstacle.NOT_LIVE):
        if problem in obstacles:
            return NoCandidate(role, problem)
    return NoCandidate(role, Obstacle.ABSENT)


def _of(workers: Sequence[WorkerView], layout: str) -> list[WorkerView]:
    return [worker for worker in workers if worker.layout_fingerprint == layout]


def _prefill_cost(worker: WorkerView, query: RouteQuery) -> float:
    return queue_s(worker) + prefill_s(worker, query)


def _decode_cost(snapshot: ClusterSnapshot, worker: WorkerView, query: RouteQuery, config: RoutingConfig) -> float:
    missing_tokens = max(0, query.num_prompt_tokens - query.held_tokens.get(worker.worker_id, 0))
    moving_s = missing_tokens * worker.kv_bytes_per_token * snapshot.default_link_s_per_byte
    return moving_s + decode_s(config, worker, query)


def _cheapest(
    workers: Sequence[WorkerView], cost: Callable[[WorkerView], float], config: RoutingConfig, rng: random.Random
) -> list[WorkerView]:
    if len(workers) <= config.candidates_per_role:
        return list(workers)
    keyed = [(cost(worker), rng.random(), position) for position, worker in enumerate(workers)]
    return [workers[position] for _, _, position in heapq.nsmallest(config.candidates_per_role, keyed)]


def _alone(worker: WorkerView, query: RouteQuery) -> Candidate:
    return Candidate(worker.worker_id, None, CostTerms(queue_s(worker), prefill_s(worker, query)))


def _pairs(
    prefills: Sequence[WorkerView],
    decodes: Sequence[WorkerView],
    snapshot: ClusterSnapshot,
    query: RouteQuery,
    config: RoutingConfig,
) -> list[Candidate]:
    decode_terms = [(decode, decode_s(config, decode, query)) for decode in decodes]
    candidates = []
    for prefill in prefills:
        waiting_s, compute_s = queue_s(prefill), prefill_s(prefill, query)
        for decode, decoding_s in decode_terms:
            moving_s = transfer_s(snapshot, prefill.worker_id, decode, query)
            terms = CostTerms(waiting_s, compute_s, moving_s, decoding_s)
            candidates.append(Candidate(prefill.worker_id, decode.worker_id, terms))
    return candidates


def _pick(
    candidates: list[Candidate],
    query: RouteQuery,
    snapshot: ClusterSnapshot,
    config: RoutingConfig,
    rng: random.Random,
) -> Decision:
    ranked = sorted(candidates, key=lambda one: (one.terms.total_s, one.prefill, one.decode or ""))
    lowest = ranked[0].terms.total_s
    tied = [one for one in ranked if one.terms.total_s <= lowest + _TIE_S]
    if config.temperature > 0 and len(ranked) > 1:
        winner = rng.choices(ranked, weights=softmax([one.terms.total_s for one in ranked], config.temperature))[0]
    else:
        winner = tied[0] if len(tied) == 1 else rng.choice(tied)
    return Decision(winner, _reason(winner, ranked, tied, query), tuple(ranked), snapshot.staleness_s)


def softmax(costs: Sequence[float], temperature: float) -> list[float]:
    """Weights of a draw: cost differences in units of the whole range, so that temperature has no unit. Pure."""
    low, high = min(costs), max(costs)
    if high - low <= _TIE_S:
        return [1.0] * len(costs)
    return [math.exp((low - cost) / ((high - low) * temperature)) for cost in costs]


def _reason(winner: Candidate, ranked: Sequence[Candidate], tied: Sequence[Candidate], query: RouteQuery) -> PickReason:
    if len(ranked) == 1:
        return PickReason.ONLY
    if winner not in tied:
        return PickReason.SAMPLED
    held = query.held_tokens.get(winner.prefill, 0)
    others: set[WorkerId] = {one.prefill for one in ranked} - {winner.prefill}
    if others and held > max(query.held_tokens.get(other, 0) for other in others):
        return PickReason.PREFIX
    return PickReason.TIE if len(tied) > 1 else PickReason.CHEAPEST
