"""What a decode worker counts beside `workers.metrics`."""

from prometheus_client import Counter, Histogram

from core.membership import Role
from core.telemetry import BATCH_BUCKETS, LATENCY_BUCKETS_S
from decode_workers import messages as m
from engine.loop import StepResult
from workers.messages import AbortRequested, GatewayLost, LastTokenComputed, StreamFinished
from workers.metrics import WorkerMetrics

_OUTCOMES = {
    StreamFinished.__name__: "finished",
    LastTokenComputed.__name__: "finished",
    m.EngineRefused.__name__: "rejected",
    AbortRequested.__name__: "aborted",
    GatewayLost.__name__: "aborted",
    m.TransferCancelled.__name__: "aborted",
}


class DecodeMetrics:
    """Metrics `tandem_decode_*`."""

    def __init__(self) -> None:
        self.worker = WorkerMetrics(Role.DECODE, _OUTCOMES)
        registry = self.worker.registry
        self.tokens = Counter("tandem_decode_tokens", "Tokens generated here.", registry=registry)
        self.held_tokens = Counter(
            "tandem_decode_held_tokens", "Prompt tokens that were here before their transfer.", registry=registry
        )
        self.kv_bytes = Counter(
            "tandem_decode_kv_bytes", "KV that was sent here, before compression.", ["exact"], registry=registry
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
        self.batch_requests = Histogram(
            "tandem_decode_batch_requests", "Requests decoding in one step.", buckets=BATCH_BUCKETS, registry=registry
        )
        self.preemptions = Counter(
            "tandem_decode_preemptions", "Running requests that lost their blocks.", registry=registry
        )

    def note_landed(self, landed: m.SendLanded) -> None:
        self.held_tokens.inc(landed.kv_tokens_held)
        self.kv_bytes.labels("yes" if landed.is_lossless else "no").inc(landed.kv_bytes)
        self.exposed_seconds.observe(landed.exposed_s)
        self.first_decode_seconds.observe(landed.first_decode_s)

    def note_step(self, result: StepResult) -> None:
        stats = result.stats
        if stats.num_decodes or stats.num_prompt_tokens:
            self.worker.step_seconds.observe(result.step_s)
            self.batch_requests.observe(stats.num_decodes)
        self.tokens.inc(sum(len(output.tokens) for output in result.outputs))
        self.preemptions.inc(stats.num_preempted)
