"""What a prefill worker counts beside `workers.metrics`."""

from prometheus_client import Counter, Gauge, Histogram

from core.membership import Role
from core.telemetry import LATENCY_BUCKETS_S
from engine.loop import StepResult
from prefill_workers import messages as m
from workers.messages import AbortRequested, GatewayLost
from workers.metrics import WorkerMetrics

_OUTCOMES = {
    m.TransferAcked.__name__: "handed_over",
    m.LastTokenComputed.__name__: "finished",
    AbortRequested.__name__: "aborted",
    GatewayLost.__name__: "aborted",
}


class PrefillMetrics:
    """Metrics `tandem_prefill_*`."""

    def __init__(self) -> None:
        self.worker = WorkerMetrics(Role.PREFILL, _OUTCOMES)
        registry = self.worker.registry
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
        self.queued_tokens = Gauge(
            "tandem_prefill_queued_tokens", "Prompt tokens in the engine that are not computed.", registry=registry
        )

    def note_computed(self, computed: m.SendComputed, num_prompt_tokens: int) -> None:
        self.prompt_tokens.inc(num_prompt_tokens)
        self.cached_tokens.inc(computed.cached_tokens)
        self.queue_seconds.observe(computed.queue_s)
        self.compute_seconds.observe(computed.compute_s)

    def note_step(self, result: StepResult) -> None:
        if result.stats.num_prompt_tokens:
            self.worker.step_seconds.observe(result.step_s)
        self.queued_tokens.set(result.load.queued_prefill_tokens)
