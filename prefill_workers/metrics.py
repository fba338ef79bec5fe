"""What a prefill worker counts beside `workers.metrics`."""

from prometheus_client import Counter, Gauge

from core.membership import Role
from engine.loop import StepResult
from prefill_workers import messages as m
from workers.messages import AbortRequested, GatewayLost, LastTokenComputed, StreamFinished
from workers.metrics import WorkerMetrics

_OUTCOMES = {
    m.TransferAcked.__name__: "handed_over",
    LastTokenComputed.__name__: "finished",
    StreamFinished.__name__: "finished",
    AbortRequested.__name__: "aborted",
    GatewayLost.__name__: "aborted",
}


class PrefillMetrics:
    """Metrics `tandem_prefill_*`."""

    def __init__(self) -> None:
        self.worker = WorkerMetrics(Role.PREFILL, _OUTCOMES)
        registry = self.worker.registry
        self.tokens = Counter("tandem_prefill_tokens", "Tokens generated here, first ones included.", registry=registry)
        self.queued_tokens = Gauge(
            "tandem_prefill_queued_tokens", "Prompt tokens in the engine that are not computed.", registry=registry
        )

    def note_step(self, result: StepResult) -> None:
        if result.stats.num_prompt_tokens:
            self.worker.step_seconds.observe(result.step_s)
        self.tokens.inc(sum(len(output.tokens) for output in result.outputs))
        self.queued_tokens.set(result.load.queued_prefill_tokens)
