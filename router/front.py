"""What the gateway's surfaces call, whatever they speak: generate, abort, tokenize, explain, facts of the model.

Knows no wire format: a surface makes a `GenerateCall`, reads the `RequestStream`, and says both in its own words."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from core.clock import Clock
from core.errors import Aborted, DuplicateRequest, ServingError
from core.ids import GatewayId, RequestId
from core.membership import Role, WorkerRecord, WorkerState
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.explain.ring import ExplainedDecision
from router.fleet import Fleet
from router.intake import GenerateCall, Intake, Prepared, Prompt
from router.metrics import GatewayMetrics
from router.quotas.service import Quotas
from router.stream import RequestStream
from router.tokenizer import GatewayTokenizer, ModelFacts


@dataclass(slots=True, eq=False)
class _Preparation:
    """A request whose prompt is being tokenised."""

    aborted: Aborted | None = None


class Front:
    """One gateway's request-level interface.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self,
        config: RouterConfig,
        cluster: str,
        gateway_id: GatewayId,
        *,
        tokenizer: GatewayTokenizer,
        facts: ModelFacts,
        intake: Intake,
        fleet: Fleet,
        dispatcher: Dispatcher,
        quotas: Quotas,
        metrics: GatewayMetrics,
        clock: Clock,
    ) -> None:
        self.config = config
        self.cluster = cluster
        self.gateway_id = gateway_id
        self.tokenizer = tokenizer
        self.facts = facts
        self.fleet = fleet
        self.dispatcher = dispatcher
        self._intake = intake
        self._quotas = quotas
        self._metrics = metrics
        self.clock = clock
        self._preparing: dict[str, _Preparation] = {}

    async def generate(self, call: GenerateCall, timeout_s: float | None) -> tuple[Prepared, RequestStream]:
        """Check a request and take it in. Whoever stops reading the stream must `abandon` it.

        Raises:
            ServingError: refused; nothing was kept.
        """
        arrived_at = self.clock.now()
        try:
            service_class = call.service.service_class or self.config.tenant(call.tenant).service_class
            self.dispatcher.check_admissible(call.request_id, call.tenant, service_class)
            with self._preparation(call.request_id) as preparation:
                prepared = await self._intake.prepare(call)
                request, service = prepared.request, prepared.service
                expected_tokens = self.dispatcher.expected_output_tokens(request, service)
                charge = await self._quotas.charge(request.tenant, request.num_prompt_tokens + expected_tokens)
                if preparation.aborted is not None:
                    self._quotas.refund(charge)
                    raise preparation.aborted
        except ServingError as error:
            self._metrics.rejected(error)
            raise
        try:
            stream = self.dispatcher.submit(
                request,
                prepared.hashes,
                arrived_at=arrived_at,
                timeout_s=self.config.request_timeout_s if timeout_s is None else timeout_s,
                service=service,
                on_concluded=lambda num_tokens: self._quotas.settle(charge, num_tokens),
            )
        except ServingError:
            self._quotas.refund(charge)
            raise
        return prepared, stream

    def abort(self, request_id: RequestId, reason: str) -> bool:
        """End a request on every worker, or before it gets to any. Returns whether it was in flight."""
        preparation = self._preparing.get(request_id)
        if preparation is not None:
            preparation.aborted = Aborted(reason)
            return True
        return self.dispatcher.abort(request_id, Aborted(reason))

    def abandon(self, stream: RequestStream, reason: str) -> None:
        """End the one request whose stream nobody reads any more. Does nothing once that is over."""
        self.dispatcher.abandon(stream, Aborted(reason))

    def explain(self, request_id: RequestId, last: int) -> list[ExplainedDecision]:
        """Return the last decisions about a request, or about any when it is empty; newest first."""
        ring = self.dispatcher.placer.explanations
        return list(reversed(ring.of(request_id)))[:last] if request_id else ring.last(last)

    async def tokenize(self, model: str, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt as `generate` would see it.

        Raises:
            ModelNotFound, InvalidRequest
        """
        self.check_model(model)
        return await self._intake.tokenize(prompt)

    def check_model(self, name: str) -> None:
        """Raises: ModelNotFound, unless `name` is empty or the model served."""
        self._intake.check_model(name)

    def max_model_len(self) -> int:
        """How long prompt and output together may be, in the cluster as it is now."""
        return longest_request(self.config, self.facts, self.fleet)

    def any_record(self) -> WorkerRecord | None:
        """Return some ready worker's record: what all workers of one model agree on, or None without workers."""
        ready = (record for record in self.fleet.records.values() if record.state is WorkerState.READY)
        return min(ready, key=lambda record: (record.role is not Role.PREFILL, record.worker_id), default=None)

    def is_serving(self) -> bool:
        """A request could be served now."""
        return self.dispatcher.can_serve()

    @contextlib.contextmanager
    def _preparation(self, request_id: str) -> Iterator[_Preparation]:
        """Make a request that is not in the dispatcher yet known to `abort`. Without an id nobody can name it."""
        preparation = _Preparation()
        if request_id in self._preparing:
            raise DuplicateRequest(f"request {request_id} is in flight")
        if request_id:
            self._preparing[request_id] = preparation
        try:
            yield preparation
        finally:
            self._preparing.pop(request_id, None)


def longest_request(config: RouterConfig, facts: ModelFacts, fleet: Fleet) -> int:
    """The model's context, less what the configuration and the ready workers of either role allow."""
    longest = min(facts.max_model_len, config.max_model_len or facts.max_model_len)
    for role in Role:
        limits = [
            record.max_model_len
            for record in fleet.records.values()
            if record.role is role and record.state is WorkerState.READY and record.max_model_len
        ]
        longest = min([longest, max(limits)]) if limits else longest
    return longest
