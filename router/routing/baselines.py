"""The policies that ours is measured against, on the same table: each knows one thing and no seconds.

random              anybody
round_robin         the next in turn
least_loaded        the fewest requests
cache_aware_local   the longest prefix while the pool is about even, else the fewest requests (as the routers do that
                    keep a prefix tree and request counts of their own; decode workers by requests)

They choose each role by itself. Eligibility, modes with a pool missing, and the predictions are those of the cost.
"""

import random
from dataclasses import replace
from typing import Protocol

import numpy as np

from router.routing.columns import ModeCode
from router.routing.config import PolicyName, RoutingConfig
from router.routing.decision import Decision, NoCandidate, PickReason
from router.routing.links import LinkModel
from router.routing.policy import CostPolicy, RoutingPolicy, gone_meanwhile
from router.routing.query import RouteQuery
from router.routing.table import WorkerTable

_EVEN_REQUESTS = 8.0  # the most and the least loaded may differ by so many,
_EVEN_RATIO = 1.5  # or by this factor, before load goes before cache
_LEAST_MATCH = 0.3  # of a prompt that is worth following


class Rule(Protocol):
    """Picks one of the slots. `held`: tokens of the prompt by slot; None: load counts, as for decoding."""

    def pick(self, slots: np.ndarray, rows: np.ndarray, held: np.ndarray | None, query: RouteQuery) -> int: ...


class BaselinePolicy:
    """Both roles by one rule. Implements `RoutingPolicy`."""

    def __init__(self, config: RoutingConfig, links: LinkModel, rule: Rule) -> None:
        self._pricer = CostPolicy(config, links)
        self._rule = rule

    def warm(self) -> None:
        self._pricer.warm()

    def choose(self, table: WorkerTable, query: RouteQuery, rng: random.Random) -> Decision | NoCandidate:
        if (gone := gone_meanwhile(table, query)) is not None:
            return gone
        self._pricer.price(table, query, rng)
        rows = table.rows
        prefills, decodes = (_shuffled(slots, rng) for slots in self._pricer.eligible())
        held = query.held.device if query.reuses_prefix else None
        prefill = self._rule.pick(prefills, rows, held, query) if len(prefills) else None
        decode = self._rule.pick(decodes, rows, None, query) if len(decodes) else None
        found = self._pricer.weigh_pair(table, prefill, decode)
        if not found.num_candidates:
            return self._pricer.nobody(query)
        modes = self._pricer.modes(found.num_candidates)
        position = modes.index(ModeCode.REMOTE_PREFILL) if ModeCode.REMOTE_PREFILL in modes else 0
        decision = self._pricer.decision(table, found, position, PickReason.BASELINE, query)
        return replace(decision, max_queued_tokens=None, max_requests_held=None)  # the rules know no second best


class RandomRule:
    """The slots come shuffled."""

    def pick(self, slots: np.ndarray, rows: np.ndarray, held: np.ndarray | None, query: RouteQuery) -> int:
        return int(slots[0])


class RoundRobinRule:
    """Slot after slot, each role by itself."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def pick(self, slots: np.ndarray, rows: np.ndarray, held: np.ndarray | None, query: RouteQuery) -> int:
        role = int(rows[slots[0]]["role"])
        last = self._last.get(role, -1)
        later = slots[slots > last]
        slot = int(later.min() if len(later) else slots.min())
        self._last[role] = slot
        return slot


class LeastLoadedRule:
    """The fewest requests, those under way included."""

    def pick(self, slots: np.ndarray, rows: np.ndarray, held: np.ndarray | None, query: RouteQuery) -> int:
        return int(slots[np.argmin(_requests(rows, slots))])


class CacheAwareRule:
    """The longest prefix, unless the pool is uneven or nobody holds much of it."""

    def pick(self, slots: np.ndarray, rows: np.ndarray, held: np.ndarray | None, query: RouteQuery) -> int:
        load = _requests(rows, slots)
        least = int(np.argmin(load))
        is_even = load.max() - load[least] <= _EVEN_REQUESTS or load.max() <= _EVEN_RATIO * load[least]
        if held is None or not is_even:
            return int(slots[least])
        longest = int(np.argmax(held[slots] - 1e-6 * load))
        is_worth_it = held[slots[longest]] >= _LEAST_MATCH * query.num_prompt_tokens
        return int(slots[longest if is_worth_it else least])


def make_policy(config: RoutingConfig, links: LinkModel) -> RoutingPolicy:
    """Return the configured policy, compiled."""
    rules: dict[PolicyName, type[Rule]] = {
        "random": RandomRule,
        "round_robin": RoundRobinRule,
        "least_loaded": LeastLoadedRule,
        "cache_aware_local": CacheAwareRule,
    }
    rule = rules.get(config.policy)
    policy = CostPolicy(config, links) if rule is None else BaselinePolicy(config, links, rule())
    policy.warm()
    return policy


def _requests(rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    chosen = rows[slots]
    load: np.ndarray = chosen["requests"] + chosen["credit_requests"] + chosen["peer_requests"]
    return load


def _shuffled(slots: np.ndarray, rng: random.Random) -> np.ndarray:
    order = slots.tolist()
    rng.shuffle(order)
    return np.array(order, np.int64)
