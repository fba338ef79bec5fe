"""What machines and links are seen to do, fitted online; the table's columns always hold the newest coefficients.

    prefill  seconds = a + b*u + c*u*(h + u/2)      u tokens computed after h that were held
    decode   step    = c0 + c1*requests + c2*context tokens
    links    see `router.routing.links`

Each worker has fits of its own. They start from the fit of its pool, which every observation of the pool feeds, and
that starts from the configuration: a new worker is taken to be as fast as its fellows. A new gateway, which has seen
nothing, goes by the rate that the worker itself reports. A worker that told nothing for a while is taken for an average
one of its pool again: otherwise one that was slow once would never be asked, and so never be seen to be fast.
"""

import math

import numpy as np

from core.clock import Clock
from core.ids import WorkerId
from core.membership import LoadReport
from router.routing.columns import RoleCode
from router.routing.config import RoutingConfig
from router.routing.fit import observe
from router.routing.links import LinkModel
from router.routing.table import WorkerTable

PREFILL_COEFFICIENTS = ("prefill_a", "prefill_b", "prefill_c")
DECODE_COEFFICIENTS = ("decode_c0", "decode_c1", "decode_c2")
_TYPICAL_TOKENS = 1024.0
_RATE_WEIGHT = 0.1  # of the newest prompt in the mean seconds per token
_NUM_ROLES = len(RoleCode)
_FORGET_S = 60.0


class LinearFit:
    """Three coefficients per slot, with one pool per role behind them."""

    def __init__(self, prior: tuple[float, float, float], weight: float, half_life: float) -> None:
        self._configured = np.array(prior)
        self._weight = weight
        self._decay = 0.5 ** (1.0 / half_life)
        self._pools = [_Fit(self._configured) for _ in range(_NUM_ROLES)]
        self._own: dict[int, _Fit] = {}

    def forget(self, slot: int) -> None:
        self._own.pop(slot, None)

    def is_observed(self, slot: int) -> bool:
        return slot in self._own

    def pool(self, role: int) -> np.ndarray:
        """Return the coefficients of a role; do not change them."""
        return self._pools[role].beta

    def observe(self, slot: int, role: int, x: tuple[float, float, float], seconds: float) -> np.ndarray:
        """Fold in one observation; return the slot's coefficients."""
        pool = self._pools[role]
        features = np.array(x)
        own = self._own.get(slot)
        if own is None:
            own = self._own[slot] = _Fit(pool.beta)
        for fit in (pool, own):
            fit.observe(features, seconds, self._weight, self._decay)
        return own.beta


class _Fit:
    """State of one fit. A coefficient that is 0 in the pool may be more elsewhere: its prior keeps a scale."""

    def __init__(self, prior: np.ndarray) -> None:
        self._gram, self._moment, self._state = np.zeros((3, 3)), np.zeros(3), np.array([1.0, 0.0, 0.0])
        self._prior = np.maximum(prior, 1e-12)
        self.beta = prior.copy()

    def observe(self, x: np.ndarray, y: float, weight: float, decay: float) -> None:
        observe(self._gram, self._moment, self._state, self._prior, x, y, weight, decay, self.beta)


class Models:
    """All fits of one gateway. Concurrency: one thread."""

    def __init__(self, config: RoutingConfig, table: WorkerTable, clock: Clock) -> None:
        priors = config.priors
        self._table = table
        self._clock = clock
        self._expected_output_tokens = float(config.expected_output_tokens)
        self._prefill = LinearFit(
            (priors.prefill_base_s, priors.prefill_per_token_s, priors.prefill_per_token2_s),
            priors.weight,
            priors.half_life,
        )
        self._decode = LinearFit(
            (priors.decode_base_s, priors.decode_per_request_s, priors.decode_per_context_token_s),
            priors.weight,
            priors.half_life,
        )
        self.links = LinkModel(config.links, table)
        _Fit(np.ones(3)).observe(np.ones(3), 1.0, 1.0, 1.0)  # compiles now, and not at the first report
        table.on_reset.append(self._reset)

    def observe_prefill(
        self, worker_id: WorkerId, num_prompt_tokens: int, cached_tokens: int, compute_s: float
    ) -> None:
        """Learn from a prompt that a worker computed: first scheduled to first token."""
        slot = self._table.find(worker_id)
        if slot is None or not 0.0 < compute_s < math.inf:
            return
        held = float(min(cached_tokens, num_prompt_tokens - 1))
        u = num_prompt_tokens - held
        row = self._table.rows[slot]
        is_first = not self._prefill.is_observed(slot)
        role, now = int(row["role"]), self._clock.now()
        beta = self._prefill.observe(slot, role, (1.0, u, u * (held + u * 0.5)), compute_s)
        self._write(slot, PREFILL_COEFFICIENTS, beta)
        row["prefill_seen_at"] = now
        self._share("prefill_seen_at", PREFILL_COEFFICIENTS, role, self._prefill.pool(role), now)
        if is_first:
            row["s_per_token"] = _seconds(beta, _TYPICAL_TOKENS) / _TYPICAL_TOKENS
        row["s_per_token"] += _RATE_WEIGHT * (compute_s / u - row["s_per_token"])

    def observe_load(self, worker_id: WorkerId, load: LoadReport) -> None:
        """Learn from a report: a busy batch's step, and, as long as nothing else is known, the rate of prompts."""
        slot = self._table.find(worker_id)
        if slot is None:
            return
        row = self._table.rows[slot]
        role, now = int(row["role"]), self._clock.now()
        if load.num_running > 0 and 0.0 < load.decode_step_s < math.inf:
            x = (1.0, float(load.num_running), float(load.context_tokens))
            beta = self._decode.observe(slot, role, x, load.decode_step_s)
            self._write(slot, DECODE_COEFFICIENTS, beta)
            row["decode_seen_at"] = now
            self._share("decode_seen_at", DECODE_COEFFICIENTS, role, self._decode.pool(role), now)
        if 0.0 < load.prefill_tokens_per_s < math.inf and not self._prefill.is_observed(slot):
            pool = self._prefill.pool(role)
            slower = _TYPICAL_TOKENS / load.prefill_tokens_per_s / _seconds(pool, _TYPICAL_TOKENS)
            self._write(slot, PREFILL_COEFFICIENTS, pool * slower)
            row["s_per_token"] = 1.0 / load.prefill_tokens_per_s
            row["prefill_seen_at"] = now

    def observe_link(
        self,
        prefill: WorkerId,
        decode: WorkerId,
        goodput_bytes_per_s: float | None,
        rtt_s: float | None,
        queued_bytes: int = 0,
    ) -> None:
        """Learn from what the sending worker says of the link."""
        p, d = self._table.find(prefill), self._table.find(decode)
        if p is not None and d is not None:
            self.links.observe(p, d, goodput_bytes_per_s, rtt_s, queued_bytes, self._clock.now())

    def observe_transfer(
        self,
        prefill: WorkerId,
        decode: WorkerId,
        *,
        quality_floor: float,
        kv_bytes: int,
        wire_bytes: int,
        exposed_s: float,
        predicted_s: float | None,
    ) -> None:
        """Learn from KV that landed. `predicted_s`: `CostTerms.transfer_s` of the decision."""
        p, d = self._table.find(prefill), self._table.find(decode)
        if p is not None and d is not None:
            self.links.observe_transfer(
                p,
                d,
                quality_floor=quality_floor,
                kv_bytes=kv_bytes,
                wire_bytes=wire_bytes,
                exposed_s=exposed_s,
                predicted_s=predicted_s,
            )

    def _reset(self, slot: int) -> None:
        self._prefill.forget(slot)
        self._decode.forget(slot)
        row = self._table.rows[slot]
        role = int(row["role"])
        prefill = self._prefill.pool(role)
        self._write(slot, PREFILL_COEFFICIENTS, prefill)
        self._write(slot, DECODE_COEFFICIENTS, self._decode.pool(role))
        row["s_per_token"] = _seconds(prefill, _TYPICAL_TOKENS) / _TYPICAL_TOKENS
        row["mean_steps"] = self._expected_output_tokens
        row["prefill_seen_at"] = row["decode_seen_at"] = -np.inf

    def _share(self, seen_at: str, names: tuple[str, str, str], role: int, pool: np.ndarray, now: float) -> None:
        """Give the pool's coefficients to the workers of the role that told nothing of their own lately."""
        rows = self._table.rows
        silent = (rows[seen_at] < now - _FORGET_S) & (rows["role"] == role)
        if not silent.any():
            return
        for name, value in zip(names, pool, strict=True):
            rows[name][silent] = value
        if names is PREFILL_COEFFICIENTS:
            rows["s_per_token"][silent] = _seconds(pool, _TYPICAL_TOKENS) / _TYPICAL_TOKENS

    def _write(self, slot: int, names: tuple[str, str, str], beta: np.ndarray) -> None:
        row = self._table.rows[slot]
        for name, value in zip(names, beta, strict=True):
            row[name] = value


def _seconds(beta: np.ndarray, tokens: float) -> float:
    return float(beta[0] + beta[1] * tokens + beta[2] * tokens * tokens * 0.5)
