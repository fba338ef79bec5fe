"""What a decode worker counts. One registry per worker."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.telemetry import BATCH_BUCKETS, LATENCY_BUCKETS_S
from decode_workers import messages as m
from engine.loop import StepResult

_OUTCOMES = {
    m.StreamFinished.__name__: "finished",
    m.ReservationRefused.__name__: "rejected",
    m.AbortRequested.__name__: "aborted",
    m.GatewayLost.__name__: "aborted",
    m.TransferCancelled.__name__: "aborted",
}


class DecodeMetrics:
    """Metrics `tandem_decode_*`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tandem_decode_requests", "Requests by how they ended here.", ["outcome", "reason"], registry=registry
        )
        self.tokens = Counter("tandem_decode_tokens", "Tokens generated here.", registry=registry)
        self.held_tokens = Counter(
            "tandem_decode_held_tokens", "Prompt tokens that were here before their transfer.", registry=registry
        )
        self.exposed_seconds = Histogram(
            "tandem_decode_exposed_seconds",
            "Prefill end to landed.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.first_decode_seconds = Histogram(
            "tandem_decode_first_decode_seconds",
            "Landed to the first token from here.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "tandem_decode_step_seconds", "One engine step.", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.batch_requests = Histogram(
            "tandem_decode_batch_requests", "Requests decoding in one step.", buckets=BATCH_BUCKETS, registry=registry
        )
        self.preemptions = Counter(
            "tandem_decode_preemptions", "Running requests that lost their blocks.", registry=registry
        )
        self.blocks = Gauge(
            "tandem_decode_blocks", "KV blocks; cached ones may be available too.", ["kind"], registry=registry
        )
        self.gateways = Gauge("tandem_decode_gateways", "Streams of gateways.", registry=registry)
        self.store_lost = Gauge("tandem_decode_store_lost", "1 while the store cannot be reached.", registry=registry)

    def note_end(self, cause: str) -> None:
        """Count a request that is done with; `cause` names the event that sealed its fate."""
        self.requests.labels(_OUTCOMES.get(cause, "failed"), cause).inc()

    def note_landed(self, landed: m.SendLanded) -> None:
        self.held_tokens.inc(landed.kv_tokens_held)
        self.exposed_seconds.observe(landed.exposed_s)
        self.first_decode_seconds.observe(landed.first_decode_s)

    def note_step(self, result: StepResult) -> None:
        stats, load = result.stats, result.load
        if stats.num_decodes or stats.num_prompt_tokens:
            self.step_seconds.observe(result.step_s)
            self.batch_requests.observe(stats.num_decodes)
        self.tokens.inc(sum(len(output.tokens) for output in result.outputs))
        self.preemptions.inc(stats.num_preempted)
        self.blocks.labels("cache").set(load.cached_blocks)
        self.blocks.labels("available").set(load.free_blocks)
        self.blocks.labels("total").set(load.total_blocks)
