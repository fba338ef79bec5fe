"""What both kinds of worker count. One registry per worker."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.membership import LoadReport, Role
from core.telemetry import LATENCY_BUCKETS_S


class WorkerMetrics:
    """Metrics `tandem_<role>_*`. A role adds its own to `registry`.

    Args:
        outcomes: what a request came to, by the event that sealed its fate; every other event is a failure.
    """

    def __init__(self, role: Role, outcomes: Mapping[str, str]) -> None:
        name = f"tandem_{role}"
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            f"{name}_requests", "Requests by how they ended here.", ["outcome", "reason"], registry=registry
        )
        self.step_seconds = Histogram(
            f"{name}_step_seconds", "One engine step.", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.blocks = Gauge(
            f"{name}_blocks", "KV blocks; cached ones may be available too.", ["kind"], registry=registry
        )
        self.gateways = Gauge(f"{name}_gateways", "Streams of gateways.", registry=registry)
        self.store_lost = Gauge(f"{name}_store_lost", "1 while the store cannot be reached.", registry=registry)
        self._outcomes = outcomes

    def note_end(self, cause: str) -> None:
        """Count a request that is done with; `cause` names the event that sealed its fate."""
        self.requests.labels(self._outcomes.get(cause, "failed"), cause).inc()

    def note_refusal(self, reason: str) -> None:
        self.requests.labels("rejected", reason).inc()

    def note_load(self, load: LoadReport) -> None:
        self.blocks.labels("cache").set(load.cached_blocks)
        self.blocks.labels("available").set(load.free_blocks)
        self.blocks.labels("total").set(load.total_blocks)
