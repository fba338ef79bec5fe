"""What a gateway learns about machines and links from what it sees. Moving averages; forgets workers that left."""

from core.ids import WorkerId
from core.membership import LoadReport
from router.config import RoutingConfig
from router.cost import decode_step_s

_WEIGHT = 0.2  # of the newest observation
_MIN_OBSERVED_BYTES = 4096


class Estimates:
    """Decode speed per worker, exposed seconds per KV byte per pair.

    The exposed part of a transfer is what a request waits for, so that is what is learned: over a long prompt most
    bytes travel while later chunks compute, and cost nothing.
    """

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config
        self._decode_scale: dict[WorkerId, float] = {}
        self._link_s_per_byte: dict[tuple[WorkerId, WorkerId], float] = {}

    @property
    def link_s_per_byte(self) -> dict[tuple[WorkerId, WorkerId], float]:
        return self._link_s_per_byte

    def decode_scale(self, worker_id: WorkerId) -> float:
        return self._decode_scale.get(worker_id, 1.0)

    def observe_load(self, worker_id: WorkerId, load: LoadReport) -> None:
        """Learn from a decode worker's measured step; an idle worker's last figure says nothing about a batch."""
        if load.num_running == 0 or load.decode_step_s <= 0:
            return
        expected_s = decode_step_s(self._config, load.num_running, load.context_tokens)
        observed = load.decode_step_s / expected_s
        known = self._decode_scale.get(worker_id)
        self._decode_scale[worker_id] = observed if known is None else known + _WEIGHT * (observed - known)

    def observe_transfer(self, prefill: WorkerId, decode: WorkerId, kv_bytes: int, exposed_s: float) -> None:
        if kv_bytes < _MIN_OBSERVED_BYTES:
            return  # all latency, no bandwidth
        pair = (prefill, decode)
        observed = max(0.0, exposed_s) / kv_bytes
        known = self._link_s_per_byte.get(pair)
        self._link_s_per_byte[pair] = observed if known is None else known + _WEIGHT * (observed - known)

    def forget(self, worker_id: WorkerId) -> None:
        """A restarted worker may be on another machine."""
        self._decode_scale.pop(worker_id, None)
        for pair in [pair for pair in self._link_s_per_byte if worker_id in pair]:
            del self._link_s_per_byte[pair]
