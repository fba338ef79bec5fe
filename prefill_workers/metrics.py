"""What a prefill worker counts. One registry per worker."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.telemetry import LATENCY_BUCKETS_S
from engine.loop import StepResult
from prefill_workers import messages as m

_OUTCOMES = {
    m.TransferAcked.__name__: "handed_over",
    m.LastTokenComputed.__name__: "finished",
    m.AbortRequested.__name__: "aborted",
    m.GatewayLost.__name__: "aborted",
}


class PrefillMetrics:
    """Metrics `tandem_prefill_*`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tandem_prefill_requests", "Requests by how they ended here.", ["outcome", "reason"], registry=registry
        )
        self.prompt_tokens = Counter(
            "tandem_prefill_prompt_tokens", "Prompt tokens of requests computed.", registry=registry
        )
        self.cached_tokens = Counter(
            "tandem_prefill_cached_tokens", "Prompt tokens that the prefix cache had.", registry=registry
        )
        self.queue_seconds = Histogram(
            "tandem_prefill_queue_seconds", "Accepted to first scheduled.", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.compute_seconds = Histogram(
            "tandem_prefill_compute_seconds",
            "First scheduled to first token.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "tandem_prefill_step_seconds", "One engine step.", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.blocks = Gauge(
            "tandem_prefill_blocks", "KV blocks; cached ones may be available too.", ["kind"], registry=registry
        )
        self.queued_tokens = Gauge(
            "tandem_prefill_queued_tokens", "Prompt tokens in the engine that are not computed.", registry=registry
        )
        self.gateways = Gauge("tandem_prefill_gateways", "Streams of gateways.", registry=registry)
        self.store_lost = Gauge("tandem_prefill_store_lost", "1 while the store cannot be reached.", registry=registry)

    def note_end(self, cause: str) -> None:
        """Count a request that is done with; `cause` names the event that sealed its fate."""
        self.requests.labels(_OUTCOMES.get(cause, "failed"), cause).inc()

    def note_computed(self, computed: m.SendComputed, num_prompt_tokens: int) -> None:
        self.prompt_tokens.inc(num_prompt_tokens)
        self.cached_tokens.inc(computed.cached_tokens)
        self.queue_seconds.observe(computed.queue_s)
        self.compute_seconds.observe(computed.compute_s)

    def note_step(self, result: StepResult) -> None:
        load = result.load
        if result.stats.num_prompt_tokens:
            self.step_seconds.observe(result.step_s)
        self.blocks.labels("cache").set(load.cached_blocks)
        self.blocks.labels("available").set(load.free_blocks)
        self.blocks.labels("total").set(load.total_blocks)
        self.queued_tokens.set(load.queued_prefill_tokens)
