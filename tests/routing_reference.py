"""The cost of every placement, written down once more without any search: what the policy must agree with."""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

from core.membership import Role
from router.routing.modes import Mode
from router.routing.query import RouteQuery
from tests.routing_world import World

Placement = tuple[Mode, str | None, str | None]


class Reference:
    """All placements of one query. Every worker is taken to be eligible."""

    def __init__(self, world: World, query: RouteQuery, workers: Mapping[str, Role]) -> None:
        self._world, self._query, self._config = world, query, world.config
        self._prefills = [name for name, role in workers.items() if role is Role.PREFILL]
        self._decodes = [name for name, role in workers.items() if role is Role.DECODE]
        self._steps = max(1, min(query.expected_output_tokens, query.max_total_tokens - query.num_prompt_tokens))
        ready = [self._prompt(name)["ready"] for name in self._prefills]
        self._horizon = min(ready) if ready else 0.0

    def totals(self) -> dict[Placement, float]:
        found: dict[Placement, float] = {}
        modes = self._config.modes
        pairs = [pair for pair in product(self._prefills, self._decodes) if self._same_layout(*pair)]
        can_pair = Mode.REMOTE_PREFILL in modes and self._prefills and self._decodes
        if can_pair:
            for p, d in pairs:
                found[Mode.REMOTE_PREFILL, p, d] = self._pair(p, d)
        for p in self._prefills:
            if Mode.COLOCATED in modes and (can_pair or not self._decodes):
                found[Mode.COLOCATED, p, None] = self._alone(p, 1.0 + self._handicap(self._decodes))
        for d in self._decodes:
            side = self._prompt(d)
            is_short = side["uncached"] <= self._config.local_prefill_max_tokens
            least = max(1.0, self._config.local_prefill_min_held_ratio * self._query.num_prompt_tokens)
            if Mode.LOCAL_PREFILL in modes and is_short and side["held"] >= least:
                found[Mode.LOCAL_PREFILL, None, d] = self._alone(d, 1.0)
            elif Mode.COLOCATED in modes and (can_pair or not self._prefills):
                found[Mode.COLOCATED, None, d] = self._alone(d, 1.0 + self._handicap(self._prefills))
        return found

    def _handicap(self, other_pool: list[str]) -> float:
        return self._config.colocation_handicap_ratio if other_pool else 0.0

    def _row(self, name: str) -> Any:
        return self._world.table.rows[self._world.slot(name)]

    def _same_layout(self, p: str, d: str) -> bool:
        return bool(self._row(p)["layout"] == self._row(d)["layout"])

    def _prompt(self, name: str) -> dict[str, float]:
        row, query = self._row(name), self._query
        n, slot = float(query.num_prompt_tokens), self._world.slot(name)

        def seconds(held: float) -> float:
            u = n - held
            return float(row["prefill_a"] + row["prefill_b"] * u + row["prefill_c"] * u * (held + u / 2))

        most = n - 1 if query.reuses_prefix else 0.0
        held, load_s = min(float(query.held.device[slot]), most), 0.0
        deeper = min(float(query.held.host[slot]), most)
        loading_s = (deeper - held) * row["kv_bytes_per_token"] / self._config.host_tier_bytes_per_s
        if deeper > held and seconds(deeper) + loading_s < seconds(held):
            held, load_s = deeper, float(loading_s)
        pool = self._prefills if row["role"] == 1 else self._decodes
        reuses = query.held.hot_reuses / len(pool)
        there = max(held, min(float(query.held.device[slot]), n - 1))
        missing = max(0.0, min(query.held.hot_tokens, n) - there)
        part = row["prefill_b"] * missing + row["prefill_c"] * missing * (held + missing / 2)
        queue = max(0.0, row["queued_tokens"] * row["s_per_token"] - (query.now - row["reported_at"]))
        queue += row["credit_prefill_s"] + row["peer_prefill_s"]
        ready = queue + seconds(held) + load_s
        late = 0.0 if query.slo.ttft_s is None else max(0.0, query.waited_s + ready - query.slo.ttft_s)
        charged = seconds(held) - part * (1 - 1 / (1 + reuses))
        rows = [self._row(one) for one in self._prefills]
        counts = [one["prompts"] + one["credit_requests"] + one["peer_requests"] for one in rows]
        crowd = sum(counts) / len(counts) if counts else 0.0
        a, b, c = (
            sum(one[name] for one in rows) / max(1, len(rows)) for name in ("prefill_a", "prefill_b", "prefill_c")
        )
        at_pool_speed = a + b * (n - held) + c * (n - held) * (held + (n - held) / 2)
        cold = max(0.0, seconds(held) - part) / max(seconds(held), 1e-9)
        return {
            "crowding": self._config.crowding_weight * crowd * at_pool_speed * cold,
            "queue": queue, "compute": seconds(held), "charged": charged,
            "load": load_s, "ready": ready, "slo": self._config.slo_weight * late, "held": held, "uncached": n - held,
        }  # fmt: skip

    def _decode(self, name: str, horizon: float) -> dict[str, float]:
        row, query = self._row(name), self._query
        n, slot = float(query.num_prompt_tokens), self._world.slot(name)

        def step(requests: float, tokens: float) -> float:
            return float(row["decode_c0"] + row["decode_c1"] * requests + row["decode_c2"] * tokens)

        life = row["mean_steps"] * step(row["running"], row["context_tokens"])
        stays = math.exp(-horizon / life)
        requests = row["running"] * stays + max(0.0, row["reserved"] - row["own_reserved"]) + row["peer_requests"]
        tokens = row["context_tokens"] * stays + row["peer_context_tokens"]
        tokens += max(0.0, row["reserved_tokens"] - row["own_reserved_tokens"])
        requests, tokens = max(row["running"], requests), max(row["context_tokens"], tokens)
        tpot = step(requests + 1, tokens + n)
        held = min(float(query.held.device[slot]), n)
        coming = math.ceil((row["credit_context_tokens"] + row["peer_context_tokens"]) / row["block_size"])
        free = row["free_blocks"] - coming
        short = max(0.0, math.ceil((n + 1 - held) / row["block_size"]) - free)
        room = short / max(1.0, row["total_blocks"] - free) * row["mean_steps"] * tpot
        slow = 0.0 if query.slo.tpot_s is None else max(0.0, tpot - query.slo.tpot_s)
        return {
            "tpot": tpot, "steps": self._steps * tpot, "room": room, "held": held,
            "slo": self._config.slo_weight * self._steps * slow,
        }  # fmt: skip

    def _late(self, ends_s: float) -> float:
        deadline = self._query.slo.deadline_s
        return 0.0 if deadline is None else self._config.slo_weight * max(0.0, ends_s - deadline)

    def _affinity(self, name: str, wanted: str | None) -> float:
        return 0.0 if wanted is None or wanted == name else self._config.affinity_credit_s

    def _pair(self, p: str, d: str) -> float:
        prompt, decode, query = self._prompt(p), self._decode(d, self._horizon), self._query
        near = self._world.models.links.classes[self._class(p, d)]
        floor = (query.quality_floor < 1.0) + (query.quality_floor < 0.99) + (query.quality_floor < 0.97)
        raw = (query.num_prompt_tokens - decode["held"]) * self._row(d)["kv_bytes_per_token"]
        wire = raw / near["ratio"][floor] / near["goodput"]
        exposed = max(near["rtt_s"] + self._config.links.tail_ratio * wire, near["rtt_s"] + wire - prompt["compute"])
        exposed *= near["residual"][floor]
        total = prompt["queue"] + prompt["charged"] + prompt["crowding"] + prompt["load"] + prompt["slo"] + exposed
        total += decode["steps"] + decode["room"] + decode["slo"]
        total += self._affinity(p, query.session.prefill) + self._affinity(d, query.session.decode)
        ends = query.waited_s + prompt["ready"] + exposed + decode["room"] + decode["steps"]
        return float(total + self._late(ends))

    def _alone(self, name: str, factor: float) -> float:
        is_prefill = self._row(name)["role"] == 1
        prompt, query = self._prompt(name), self._query
        horizon = prompt["ready"] if is_prefill or not self._prefills else self._horizon
        decode = self._decode(name, horizon)
        slower = self._config.colocated_slowdown if is_prefill else 1.0
        running = 0.0 if is_prefill else self._row(name)["running"]
        stall = self._config.stall_weight * running * prompt["compute"]
        ends = query.waited_s + prompt["ready"] + decode["room"] + slower * decode["steps"]
        tpot = slower * decode["tpot"] + min(1.0, running) * prompt["compute"] / self._steps
        slow = 0.0 if query.slo.tpot_s is None else max(0.0, tpot - query.slo.tpot_s)
        slow *= 1.0 + self._config.stall_weight * running
        total = prompt["queue"] + prompt["charged"] + prompt["crowding"] + prompt["load"] + prompt["slo"]
        total += slower * decode["steps"] + decode["room"] + stall
        total += self._config.slo_weight * self._steps * slow + self._late(ends)
        wanted = query.session.prefill if is_prefill else query.session.decode
        return float(total * factor + self._affinity(name, wanted))

    def _class(self, p: str, d: str) -> int:
        one, other = self._row(p), self._row(d)
        for position, place in enumerate(("host", "rack", "zone")):
            if one[place] and one[place] == other[place]:
                return position
        return 3
