"""What both kinds of worker count. One registry per worker."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.membership import LoadReport, Role
from core.telemetry import LATENCY_BUCKETS_S
from workers.messages import SendComputed


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
        self.prompt_tokens = Counter(
            f"{name}_prompt_tokens", "Prompt tokens of prompts computed here.", registry=registry
        )
        self.cached_tokens = Counter(
            f"{name}_cached_tokens", "Prompt tokens of those that the prefix cache had.", registry=registry
        )
        self.queue_seconds = Histogram(
            f"{name}_queue_seconds", "Accepted to first scheduled.", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.compute_seconds = Histogram(
            f"{name}_compute_seconds",
            "First scheduled to first token.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
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

    def note_computed(self, computed: SendComputed, num_prompt_tokens: int) -> None:
        """Count a prompt that was computed here."""
        self.prompt_tokens.inc(num_prompt_tokens)
        self.cached_tokens.inc(computed.cached_tokens)
        self.queue_seconds.observe(computed.queue_s)
        self.compute_seconds.observe(computed.compute_s)

    def note_load(self, load: LoadReport) -> None:
        self.blocks.labels("cache").set(load.cached_blocks)
        self.blocks.labels("available").set(load.free_blocks)
        self.blocks.labels("total").set(load.total_blocks)
