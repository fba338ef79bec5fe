"""What the gateway's surfaces call, whatever they speak: generate, abort, tokenize, explain, facts of the model.

Knows no wire format: a surface makes `GenerateCall`s, reads the `Answer`, and says both in its own words."""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from core.clock import Clock
from core.errors import Aborted, ServingError
from core.ids import GatewayId, RequestId
from core.membership import Role, WorkerRecord, WorkerState
from router.chat.messages import ChatCall, chat_size
from router.chat.plan import plan_chat
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.explain.ring import ExplainedDecision
from router.fleet import Fleet
from router.generation.answer import Answer
from router.generation.chat_answer import ChatAnswer
from router.generation.desk import AnswerDesk
from router.generation.provenance import Provenance
from router.intake import GenerateCall, Intake, Prompt
from router.metrics import GatewayMetrics
from router.quotas.service import Quotas
from router.resume.port import StreamKeeper
from router.tokenizer import GatewayTokenizer, ModelFacts

_CALL_ID_BYTES = 12


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
        resumables: StreamKeeper,
        abort_elsewhere: Callable[[str, str], Awaitable[bool]],
    ) -> None:
        self.config = config
        self.cluster = cluster
        self.gateway_id = gateway_id
        self.tokenizer = tokenizer
        self.facts = facts
        self.fleet = fleet
        self.dispatcher = dispatcher
        self.clock = clock
        self.resumables = resumables
        self._abort_elsewhere = abort_elsewhere
        self._metrics = metrics
        self._intake = intake
        self._desk = AnswerDesk(
            config,
            tokenizer=tokenizer,
            intake=intake,
            dispatcher=dispatcher,
            quotas=quotas,
            metrics=metrics,
            clock=clock,
            provenance=lambda: Provenance.of(self.any_record()),
        )

    async def answer(self, calls: Sequence[GenerateCall], timeout_s: float | None) -> Answer:
        """Check a call and take it in; several differ in their prompts only. Choices are numbered prompt by prompt:
        answer j to prompt i is choice i * n + j. Whoever stops reading the answer must `abandon` it.

        Raises:
            ServingError: refused; nothing was kept.
        """
        return await self._desk.answer(calls, timeout_s)

    async def chat(self, call: GenerateCall, chat: ChatCall, timeout_s: float | None) -> ChatAnswer:
        """Take in what answers a conversation, as `answer` does.

        Args:
            call: its prompt is made of the chat; its constraint is the chat's.

        Raises:
            ServingError: refused; nothing was kept.
        """
        try:
            self.check_model(call.model)
            size = chat_size(chat.messages, chat.tools, chat.template_arguments)
            plan = await self._intake.work_on("chat", size, lambda: plan_chat(chat, self.tokenizer.chat_style))
        except ServingError as error:
            self._metrics.rejected(error)
            raise
        sampling = replace(call.sampling, constraint=plan.constraint)
        call = replace(call, prompt=plan.prompt, sampling=sampling, spoken_tokens=plan.spoken_tokens)
        answer = await self.answer([call], timeout_s)
        return ChatAnswer(answer, plan, lambda: secrets.token_hex(_CALL_ID_BYTES))

    async def abort(self, request_id: str, reason: str, *, tenant: str) -> bool:
        """End a tenant's call with all its choices on every worker, or before it gets to any, at whichever gateway of
        the cluster it is. Returns whether there was one.

        Raises:
            StoreUnavailable: it is none of this gateway's, and the others cannot be asked.
        """
        return self.abort_here(request_id, reason, tenant=tenant) or await self._abort_elsewhere(request_id, tenant)

    def abort_here(self, request_id: str, reason: str, *, tenant: str) -> bool:
        """End a tenant's call if it is one of this gateway's. Returns whether it was."""
        return self._desk.abort(request_id, Aborted(reason), tenant=tenant)

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

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out.

        Raises:
            ModelNotFound, InvalidRequest
        """
        self.check_model(model)
        return await self._intake.detokenize(tuple(token_ids))

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

    @property
    def is_draining(self) -> bool:
        """The gateway is stopping: what runs may finish, nothing new comes in."""
        return self.dispatcher.is_draining

    def is_serving(self) -> bool:
        """A request could be served now."""
        return self.dispatcher.can_serve()


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
