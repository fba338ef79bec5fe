"""The gateway's metrics: `tandem_gateway_*` (requests as clients meet them) and `tandem_router_*` (decisions)."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.errors import Aborted, PermissionDenied, RejectedError, ServingError, SlowReader, Unauthenticated
from core.service_class import ServiceClass
from core.telemetry import LATENCY_BUCKETS_S
from router.explain.outcome import Hindsight
from router.routing.decision import Decision
from router.stream import Completion

DECISION_BUCKETS_S = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1)
ERROR_BUCKETS_S = (-10.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class GatewayMetrics:
    """Metrics of one gateway in a registry of its own. Label values are enums of ours, never a client's text."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "tandem_gateway_requests", "Requests by how they ended.", ["outcome", "reason"], registry=registry
        )
        self._rejected = Counter(
            "tandem_gateway_rejected", "Requests refused before they entered.", ["reason"], registry=registry
        )
        self.active = Gauge("tandem_gateway_active_requests", "Requests in the gateway now.", registry=registry)
        self.queued = Gauge(
            "tandem_gateway_queued_requests", "Requests that no workers accepted yet.", registry=registry
        )
        self._queued_by_class = Gauge(
            "tandem_gateway_queued_by_class",
            "Requests that no workers accepted yet.",
            ["service_class"],
            registry=registry,
        )
        self._late_bound = Gauge(
            "tandem_router_late_bound_prompts", "Prompts under way without a decode worker yet.", registry=registry
        )
        self._open_breakers = Gauge(
            "tandem_router_open_breakers",
            "Workers left alone, or tried again, for failures.",
            registry=registry,
        )
        self._ttft = self._latency("tandem_gateway_time_to_first_token_seconds", "Arrival to first token.")
        self._tpot = self._latency("tandem_gateway_time_per_output_token_seconds", "Mean gap between tokens.")
        self._total = self._latency("tandem_gateway_request_duration_seconds", "Arrival to last token.")
        self._queue = self._latency("tandem_gateway_queue_seconds", "TTFT part: arrival to dispatch.")
        self._route = self._latency(
            "tandem_router_route_seconds", "TTFT part: dispatch until who is needed now accepted."
        )
        self._prefill = self._latency("tandem_gateway_prefill_seconds", "TTFT part: accepted to first token.")
        self._transfer = self._latency("tandem_gateway_transfer_seconds", "Exposed part of the KV hand-off.")
        self._first_decode = self._latency("tandem_gateway_first_decode_seconds", "KV landed to next token.")
        self._prompt_tokens = Histogram(
            "tandem_gateway_prompt_tokens", "Prompt length.", buckets=TOKEN_BUCKETS, registry=registry
        )
        self._output_tokens = Counter("tandem_gateway_output_tokens", "Tokens sent to clients.", registry=registry)
        self._hit_tokens = Counter(
            "tandem_router_prefix_hit_tokens", "Prompt tokens found in prefill caches.", registry=registry
        )
        self._kv_bytes = Counter(
            "tandem_router_kv_transfer_bytes", "KV moved for requests, before compression.", registry=registry
        )
        self._kv_wire_bytes = Counter(
            "tandem_router_kv_wire_bytes", "What that was between the workers.", ["exact"], registry=registry
        )
        self._foreseen = Counter(
            "tandem_gateway_foreseen_misses",
            "Requests whose targets would be missed, as predicted at the door.",
            ["reason", "refused"],
            registry=registry,
        )
        self._decisions = Counter(
            "tandem_router_decisions", "Placements.", ["reason", "mode", "mode_reason", "binding"], registry=registry
        )
        self._decision_s = Histogram(
            "tandem_router_decision_seconds",
            "What one placement took to decide.",
            buckets=DECISION_BUCKETS_S,
            registry=registry,
        )
        self._ttft_error = Histogram(
            "tandem_router_ttft_error_seconds",
            "Time to first token, observed less predicted.",
            buckets=ERROR_BUCKETS_S,
            registry=registry,
        )
        self._regret = Histogram(
            "tandem_router_regret_seconds",
            "What a placement turned out to cost, less what the best other one was predicted to.",
            buckets=ERROR_BUCKETS_S,
            registry=registry,
        )
        self._refusals = Counter(
            "tandem_router_worker_refusals", "Work that a worker refused.", ["reason"], registry=registry
        )
        self._losses = Counter("tandem_router_worker_losses", "Links to workers that ended.", registry=registry)
        self.staleness = Gauge(
            "tandem_router_store_staleness_seconds", "Age of the mirror of the shared store.", registry=registry
        )
        self.replicas = Gauge(
            "tandem_router_replicas", "Gateways of the cluster as known here, this one included.", registry=registry
        )
        self.replica_silence = Gauge(
            "tandem_router_replica_silence_seconds", "Since the quietest other gateway was heard.", registry=registry
        )
        self.quotas_alone = Gauge(
            "tandem_router_quotas_alone", "1 while this gateway counts tenants' quotas alone.", registry=registry
        )
        self.index_bytes = Gauge("tandem_router_prefix_index_bytes", "Memory of the prefix index.", registry=registry)
        self.workers = Gauge("tandem_router_live_workers", "Ready and connected workers.", ["role"], registry=registry)

    def forwarding(self, queued: Mapping[ServiceClass, int], late_bound: int, open_breakers: int) -> None:
        """What waits, and what is avoided."""
        for service_class, count in queued.items():
            self._queued_by_class.labels(service_class).set(count)
        self._late_bound.set(late_bound)
        self._open_breakers.set(open_breakers)

    def rejected(self, error: ServingError) -> None:
        """A request was refused before it entered."""
        self._rejected.labels(_reason_of(error)).inc()

    def missed(self, error: RejectedError, *, is_enforced: bool) -> None:
        """The door foresaw that a request would miss its targets."""
        self._foreseen.labels(error.reason, "yes" if is_enforced else "no").inc()

    def decided(self, decision: Decision) -> None:
        """A placement was chosen."""
        self._decisions.labels(decision.reason, decision.mode, decision.mode_reason, decision.binding).inc()
        self._decision_s.observe(decision.decision_s)

    def refused(self, error: RejectedError) -> None:
        self._refusals.labels(error.reason).inc()

    def worker_lost(self) -> None:
        self._losses.inc()

    def judged(self, hindsight: Hindsight) -> None:
        """How right the decision behind a request was."""
        self._ttft_error.observe(hindsight.ttft_error_s)
        self._regret.observe(hindsight.regret_s)

    def finished(self, completion: Completion) -> None:
        timing = completion.timing
        self._requests.labels("finished", completion.finish.reason).inc()
        self._ttft.observe(timing.ttft_s)
        self._queue.observe(timing.queue_s)
        self._route.observe(timing.route_s)
        self._prefill.observe(timing.prefill_s)
        self._total.observe(timing.total_s)
        if completion.completion_tokens > 1:
            self._tpot.observe(timing.tpot_s)
        if completion.landed is not None:
            self._transfer.observe(completion.landed.exposed_s)
            self._first_decode.observe(completion.landed.first_decode_s)
            self._kv_bytes.inc(completion.landed.kv_bytes)
            is_exact = "yes" if completion.landed.kv_lossless else "no"
            self._kv_wire_bytes.labels(is_exact).inc(completion.landed.kv_wire_bytes)
        self._prompt_tokens.observe(completion.prompt_tokens)
        self._output_tokens.inc(completion.completion_tokens)
        self._hit_tokens.inc(completion.cached_tokens)

    def failed(self, error: ServingError, num_tokens: int) -> None:
        """A request that had entered ended badly, after `num_tokens` tokens."""
        outcome = "aborted" if isinstance(error, Aborted | SlowReader) else "failed"
        self._requests.labels(outcome, _reason_of(error)).inc()
        self._output_tokens.inc(num_tokens)

    def _latency(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=LATENCY_BUCKETS_S, registry=self.registry)


def _reason_of(error: ServingError) -> str:
    if isinstance(error, RejectedError | Unauthenticated | PermissionDenied):
        return str(error.reason)
    return error.grpc_code.lower()
