"""The routing policy: one cost in seconds over (prefill worker, decode worker, mode). Reads the table, changes nothing.

1. Filter: who can be asked (`router.routing.prices`, as the next step).
2. Score: each of them gets its price, which is its side of the cost; then the cheapest placements over all pairs and
   modes are searched (`router.routing.search`).
3. Pick: the cheapest, or a softmax draw at temperature > 0. Ties are broken by the generator, never by order.
4. Bind: the decode worker of a remote prefill is asked first, so that KV is sent while the prompt computes; when none
   has room now but will, the prefill begins at once and the decode worker is chosen meanwhile (`Binding.LATE`).

The estimate only orders the candidates; the worker's own accept or reject is the truth. So that it can be, a decision
says how much busier its workers may be than thought before the next best would have won.
"""

import logging
import math
import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from core.ids import WorkerId
from core.membership import Role
from router.routing.columns import CANDIDATE, FOUND, QUERY, SIDE, WORKER
from router.routing.config import RoutingConfig
from router.routing.decision import CandidateList, Decision, NoCandidate, Obstacle, PickReason
from router.routing.links import LinkModel
from router.routing.modes import Binding, Mode, ModeReason
from router.routing.prices import NOT_LIVE_BIT, REFUSED_BIT, TOO_LONG_BIT, price_workers
from router.routing.query import RouteQuery
from router.routing.search import TIE_S, search
from router.routing.settings import settings_of
from router.routing.table import WorkerTable
from router.routing.topology import floor_class

_log = logging.getLogger(__name__)
_INF = math.inf
# REFUSED before TOO_LONG: a worker that is busy now can take it later, so the request is worth keeping.
_OBSTACLES = (
    (REFUSED_BIT, Obstacle.REFUSED),
    (TOO_LONG_BIT, Obstacle.TOO_LONG),
    (NOT_LIVE_BIT, Obstacle.NOT_LIVE),
)


class Found(NamedTuple):
    """What a search said, beside the candidates (`columns.FOUND`, in its order)."""

    num_candidates: int
    num_prefill: int
    num_decode: int
    is_late: bool
    has_prefill_pool: bool
    has_decode_pool: bool
    prefill_obstacles: int
    decode_obstacles: int
    next_prefill_s: float
    next_decode_s: float
    prefill_slack_s: float
    decode_slack_s: float
    is_tie: bool
    has_longest_prefix: bool
    max_queued_tokens: int
    max_requests_held: int


assert Found._fields == FOUND.names


class RoutingPolicy(Protocol):
    """Chooses workers for one request. Pure but for the draw: same table, query and generator, same answer."""

    def choose(self, table: WorkerTable, query: RouteQuery, rng: random.Random) -> Decision | NoCandidate: ...


class CostPolicy:
    """The policy of a cluster.

    Concurrency: one thread; the buffers are reused from call to call.
    """

    def __init__(self, config: RoutingConfig, links: LinkModel) -> None:
        self._config = config
        self._links = links
        self._settings = settings_of(config)
        self._query = np.zeros(1, QUERY)
        self._found = np.zeros(1, FOUND)
        self._top = np.zeros(config.candidates_kept, CANDIDATE)
        self._top_bytes = self._top.view(np.uint8)  # the same memory: copying it field by field takes longer
        self._top_slots = self._top.view(np.int64).reshape(len(self._top), -1)[:, -2:]  # `prefill` and `decode`
        self._sides = np.zeros(0, SIDE)
        self._prefills = self._decodes = np.zeros(0, np.int64)
        self._refused = np.zeros(0, np.bool_)

    def warm(self) -> None:
        """Compile, or read what was compiled before: seconds once, which no request should wait for."""
        _log.info("loading the compiled policy; where it is not yet, compiling it, once per machine")
        slots = np.zeros(1, np.int64)
        nothing, found = np.zeros(1, WORKER), np.zeros(1, FOUND)
        held, refused = np.zeros(1), np.zeros(1, np.bool_)
        sides = np.zeros(1, SIDE)
        price_workers(
            nothing,
            np.zeros((1, 1, 2)),
            held,
            held,
            refused,
            0,
            self._query,
            self._settings,
            sides,
            slots,
            slots,
            found,
        )
        pairs, classes = self._links.pairs, self._links.classes
        search(nothing, pairs, classes, self._query, self._settings, sides, slots, slots, found, self._top)
        _log.info("the policy is ready")

    def choose(self, table: WorkerTable, query: RouteQuery, rng: random.Random) -> Decision | NoCandidate:
        if (gone := gone_meanwhile(table, query)) is not None:
            return gone
        self.price(table, query, rng)
        found = self.weigh(table)
        if not found.num_candidates:
            return self.nobody(query)
        position = self._draw(found.num_candidates, rng)
        return self.decision(table, found, position, _pick_reason(found, position), query)

    def price(self, table: WorkerTable, query: RouteQuery, rng: random.Random) -> None:
        """Price every worker that can be asked."""
        rows, held = table.rows, query.held
        table.forecast.advance(rows, query.now)
        self._fit_buffers(len(rows))
        self._ask(table, query, rng)
        refused = [slot for name in query.refused if (slot := table.find(name)) is not None]
        for slot in refused:
            self._refused[slot] = True
        price_workers(
            rows, table.forecast.joins, held.device, held.host, self._refused, len(rows), self._query, self._settings,
            self._sides, self._prefills, self._decodes, self._found,
        )  # fmt: skip
        for slot in refused:
            self._refused[slot] = False

    def eligible(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots of the prefill and of the decode workers that were priced; valid until the next call."""
        found = self._found[0]
        return self._prefills[: found["num_prefill"]], self._decodes[: found["num_decode"]]

    def weigh(self, table: WorkerTable) -> Found:
        """Search the cheapest placements over what was priced."""
        links = self._links
        search(
            table.rows, links.pairs, links.classes, self._query, self._settings, self._sides, self._prefills,
            self._decodes, self._found, self._top,
        )  # fmt: skip
        return Found._make(self._found[0].item())

    def weigh_pair(self, table: WorkerTable, prefill: int | None, decode: int | None) -> Found:
        """As `weigh`, over these two workers only."""
        for slots, slot, count in ((self._prefills, prefill, "num_prefill"), (self._decodes, decode, "num_decode")):
            self._found[0][count] = slot is not None
            if slot is not None:
                slots[0] = slot
        return self.weigh(table)

    def decision(
        self, table: WorkerTable, found: Found, position: int, reason: PickReason, query: RouteQuery
    ) -> Decision:
        """Return the decision for one of the candidates. Only the cheapest has bounds: of another nobody can say that
        it is wrong by the cost."""
        count = found.num_candidates
        slots = set(self._top_slots[:count].ravel().tolist())
        names = {slot: name for slot in slots if (name := table.slots.worker(slot)) is not None}
        ranked = CandidateList(self._top_bytes[: count * CANDIDATE.itemsize].tobytes(), names)
        winner = ranked.at(position)
        is_late = found.is_late and winner.mode is Mode.REMOTE_PREFILL
        is_bounded = position == 0
        return Decision(
            winner,
            self._mode_reason(winner.mode, query, found),
            reason,
            Binding.LATE if is_late else Binding.EARLY,
            ranked,
            found.prefill_slack_s if is_bounded else _INF,
            found.decode_slack_s if is_bounded else _INF,
            found.max_queued_tokens if is_bounded and found.max_queued_tokens >= 0 else None,
            found.max_requests_held if is_bounded and found.max_requests_held >= 0 else None,
            found.num_prefill + found.num_decode,
            query.staleness_s,
        )

    def modes(self, num_candidates: int) -> list[int]:
        """Return the mode codes of what was found, cheapest first."""
        modes: list[int] = self._top["mode"][:num_candidates].tolist()
        return modes

    def _fit_buffers(self, num_slots: int) -> None:
        if len(self._sides) < num_slots:
            self._sides = np.zeros(num_slots, SIDE)
            self._prefills, self._decodes = np.zeros(num_slots, np.int64), np.zeros(num_slots, np.int64)
            self._refused = np.zeros(num_slots, np.bool_)

    def _ask(self, table: WorkerTable, query: RouteQuery, rng: random.Random) -> None:
        steps = min(query.expected_output_tokens, query.max_total_tokens - query.num_prompt_tokens)
        slo, session = query.slo, query.session
        self._query[0] = (
            query.now,
            query.num_prompt_tokens,
            query.num_prompt_tokens - 1 if query.reuses_prefix else 0,
            query.max_total_tokens,
            query.needs_decode,
            query.allow_late,
            max(1, steps) if query.needs_decode else 0,
            query.waited_s,
            _INF if slo.ttft_s is None else slo.ttft_s,
            _INF if slo.tpot_s is None else slo.tpot_s,
            _INF if slo.deadline_s is None else slo.deadline_s,
            query.held.hot_tokens,
            query.held.hot_reuses,
            floor_class(query.quality_floor),
            _slot(table, query.bound_prefill),
            _slot(table, query.reserved_decode),
            _slot(table, session.prefill),
            _slot(table, session.decode),
            query.remaining_prefill_s,
            rng.getrandbits(63),
        )
        settings = self._settings[0]
        settings["best_bytes_per_s"], settings["least_rtt_s"], settings["least_residual"] = self._links.bounds

    def nobody(self, query: RouteQuery) -> NoCandidate:
        """Return who is missing, when nothing was found."""
        found = self._found[0]
        has_prefill, has_decode = bool(found["num_prefill"]), bool(found["num_decode"])
        if has_prefill and (has_decode or not query.needs_decode):
            is_paired = Mode.REMOTE_PREFILL in self._config.modes
            role = Role.PREFILL if query.reserved_decode else Role.DECODE
            return NoCandidate(role, Obstacle.LAYOUT if is_paired else Obstacle.MODE)
        can_decode_alone = not found["has_prefill_pool"] and Mode.COLOCATED in self._config.modes
        if can_decode_alone and found["decode_obstacles"] & REFUSED_BIT:
            return NoCandidate(Role.DECODE, Obstacle.REFUSED)  # whatever the prefill workers lack
        role, bits = (
            (Role.DECODE, int(found["decode_obstacles"]))
            if has_prefill
            else (Role.PREFILL, int(found["prefill_obstacles"]))
        )
        for bit, obstacle in _OBSTACLES:
            if bits & bit:
                return NoCandidate(role, obstacle)
        return NoCandidate(role, Obstacle.ABSENT)

    def _draw(self, num_candidates: int, rng: random.Random) -> int:
        if self._config.temperature <= 0 or num_candidates == 1:
            return 0
        totals = self._top["total_s"][:num_candidates].tolist()
        return rng.choices(range(num_candidates), weights=softmax(totals, self._config.temperature))[0]

    def _mode_reason(self, mode: Mode, query: RouteQuery, found: Found) -> ModeReason:
        if not query.needs_decode:
            return ModeReason.FIRST_TOKEN_IS_LAST
        if mode is Mode.LOCAL_PREFILL:
            return ModeReason.PREFIX_AT_DECODE
        if mode is Mode.COLOCATED and not found.has_prefill_pool:
            return ModeReason.NO_PREFILL_POOL
        if mode is Mode.COLOCATED and not found.has_decode_pool:
            return ModeReason.NO_DECODE_POOL
        return ModeReason.ONLY_POSSIBLE if len(self._config.modes) == 1 else ModeReason.CHEAPEST


def gone_meanwhile(table: WorkerTable, query: RouteQuery) -> NoCandidate | None:
    """Return that a worker is not there any more which the request cannot change for another. Pure."""
    for fixed, role in ((query.reserved_decode, Role.DECODE), (query.bound_prefill, Role.PREFILL)):
        if fixed is not None and table.find(fixed) is None:
            return NoCandidate(role, Obstacle.ABSENT)
    return None


def softmax(costs: Sequence[float], temperature: float) -> list[float]:
    """Weights of a draw: cost differences in units of the whole range, so that temperature has no unit. Pure."""
    low, high = min(costs), max(costs)
    if high - low <= TIE_S:
        return [1.0] * len(costs)
    return [math.exp((low - cost) / ((high - low) * temperature)) for cost in costs]


def _pick_reason(found: Found, position: int) -> PickReason:
    if found.num_candidates == 1:
        return PickReason.ONLY
    if position:
        return PickReason.SAMPLED
    if found.has_longest_prefix:
        return PickReason.PREFIX
    return PickReason.TIE if found.is_tie else PickReason.CHEAPEST


def _slot(table: WorkerTable, worker_id: WorkerId | None) -> int:
    slot = None if worker_id is None else table.find(worker_id)
    return -1 if slot is None else slot
