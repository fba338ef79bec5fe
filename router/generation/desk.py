"""Takes calls in and makes answers of them; knows every call in flight by its id.

A call is admitted whole or not at all: one charge at the tenant's quotas, whatever the number of its choices, and a
choice that the dispatcher refuses takes those submitted before it along.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from core.clock import Clock
from core.errors import Aborted, DuplicateRequest, InvalidRequest, ServingError
from core.ids import RequestId
from core.request import MAX_SEED, GenerateRequest
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.generation.answer import Answer
from router.generation.provenance import Provenance
from router.generation.text import GenerationText
from router.intake import GenerateCall, Intake, Prepared
from router.metrics import GatewayMetrics
from router.quotas.service import QuotaCharge, Quotas
from router.reading_turns import ReadingTurns
from router.tokenizer import GatewayTokenizer

_AT_ONCE = 8  # choices that are submitted before the event loop looks at what else there is: some milliseconds


@dataclass(slots=True, eq=False)
class _Preparation:
    """A call whose prompts are being tokenised."""

    tenant: str
    aborted: Aborted | None = None


class AnswerDesk:
    """The calls of one gateway.

    Args:
        provenance: of what is computed now.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        tokenizer: GatewayTokenizer,
        intake: Intake,
        dispatcher: Dispatcher,
        quotas: Quotas,
        metrics: GatewayMetrics,
        clock: Clock,
        provenance: Callable[[], Provenance],
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._intake = intake
        self._dispatcher = dispatcher
        self._quotas = quotas
        self._metrics = metrics
        self._clock = clock
        self._provenance = provenance
        self._preparing: dict[str, _Preparation] = {}
        self._answers: dict[str, Answer] = {}
        self._turns = ReadingTurns()

    async def answer(self, calls: Sequence[GenerateCall], timeout_s: float | None) -> Answer:
        """Check calls that differ in nothing but their prompts, and take them in as one.

        Raises:
            ServingError: refused; nothing was kept.
        """
        first = calls[0]
        arrived_at = self._clock.now()
        try:
            self._check_num_choices(calls)
            service_class = first.service.service_class or self._config.tenant(first.tenant).service_class
            with self._preparation(first) as preparation:
                self._dispatcher.check_admissible(first.request_id, first.tenant, service_class)
                prepared = await self._prepare(calls)
                charge = await self._charge(prepared, first.n)
                if preparation.aborted is not None:
                    self._quotas.refund(charge)
                    raise preparation.aborted
        except ServingError as error:
            self._metrics.rejected(error)
            raise
        timeout_s = self._config.request_timeout_s if timeout_s is None else timeout_s
        return await self._submit(prepared, first, charge, arrived_at=arrived_at, timeout_s=timeout_s)

    def abort(self, request_id: str, error: Aborted, *, tenant: str) -> bool:
        """End a call of this tenant on every worker, or before it gets to any. Returns whether there was one."""
        preparation = self._preparing.get(request_id)
        if preparation is not None and preparation.tenant == tenant:
            preparation.aborted = error
            return True
        answer = self._answers.get(request_id)
        if answer is not None and answer.requests[0].tenant == tenant:
            answer.abort(error)
            return True
        return False

    def _check_num_choices(self, calls: Sequence[GenerateCall]) -> None:
        n, bound = calls[0].n, self._config.max_choices
        assert all(call.n == n for call in calls), "calls of one answer differ in their prompts only"
        if n < 1:
            raise InvalidRequest("n", f"must be at least 1, got {n}")
        if n * len(calls) > bound:
            prompts = f" to each of {len(calls)} prompts" if len(calls) > 1 else ""
            raise InvalidRequest("n", f"{n} answers{prompts} are more than the {bound} that one call may ask for")

    async def _prepare(self, calls: Sequence[GenerateCall]) -> list[Prepared]:
        """Prompts one after the other: one client's many prompts do not keep others' from the loop and the threads.
        They share the first one's id and seed."""
        prepared = [await self._intake.prepare(calls[0])]
        self._check_num_scores(prepared)
        first = prepared[0].request
        for call in calls[1:]:
            await asyncio.sleep(0)
            same = replace(
                call,
                request_id=first.request_id,
                sampling=replace(call.sampling, seed=first.sampling.seed),
                has_seed=True,
            )
            prepared.append(await self._intake.prepare(same))
            self._check_num_scores(prepared)
        return prepared

    def _check_num_scores(self, prepared: Sequence[Prepared]) -> None:
        """They come in one piece, before the answer's first token."""
        alternatives, bound = prepared[0].request.sampling.prompt_logprobs, self._config.max_prompt_logprobs
        if alternatives is None:
            return
        num_tokens = sum(one.request.num_prompt_tokens for one in prepared)
        if num_tokens * (1 + alternatives) > bound:
            asked = f"{num_tokens} prompt tokens with {alternatives} alternatives each"
            raise InvalidRequest(
                "sampling.prompt_logprobs", f"{asked} are more log-probabilities than the {bound} of one call"
            )

    async def _charge(self, prepared: Sequence[Prepared], n: int) -> QuotaCharge | None:
        num_tokens = sum(
            one.request.num_prompt_tokens + self._dispatcher.expected_output_tokens(one.request, one.service)
            for one in prepared
        )
        return await self._quotas.charge(prepared[0].request.tenant, n * num_tokens)

    async def _submit(
        self,
        prepared: Sequence[Prepared],
        call: GenerateCall,
        charge: QuotaCharge | None,
        *,
        arrived_at: float,
        timeout_s: float,
    ) -> Answer:
        n = call.n
        base_id = prepared[0].request.request_id
        bill = _Bill(len(prepared) * n, lambda num_tokens: self._quotas.settle(charge, num_tokens))
        answer = Answer(
            tuple(one.request for one in prepared),
            self._config.model_name,
            self._provenance(),
            turns=self._turns,
            end=self._dispatcher.abandon,
            on_over=lambda: self._forget(base_id, answer),
        )
        if base_id in self._answers:  # its first choice may be over already, its name is not free
            self._quotas.refund(charge)
            raise DuplicateRequest(f"request {base_id} is in flight")
        self._answers[base_id] = answer
        try:
            for number in range(len(prepared) * n):
                if number and number % _AT_ONCE == 0:
                    await asyncio.sleep(0)  # others have their turn
                prompt, sibling = prepared[number // n], number % n
                request = _choice(prompt.request, base_id, number, sibling)
                stream = self._dispatcher.submit(
                    request,
                    prompt.hashes,
                    arrived_at=arrived_at,
                    timeout_s=timeout_s,
                    service=prompt.service,
                    on_concluded=bill.add,
                )
                text = GenerationText(self._tokenizer.detokenizer, request, call.spoken_tokens)
                answer.add(stream, text, scores_prompt=request.sampling.prompt_logprobs is not None)
        except BaseException as error:  # refused, or the client left meanwhile
            bill.tear_up()
            answer.abandon(f"the call was not taken in whole: {error}")
            self._forget(base_id, answer)
            self._quotas.refund(charge)
            raise
        return answer

    def _forget(self, request_id: str, answer: Answer) -> None:
        if self._answers.get(request_id) is answer:
            del self._answers[request_id]

    @contextlib.contextmanager
    def _preparation(self, call: GenerateCall) -> Iterator[_Preparation]:
        """Make a call that is not in the dispatcher yet known to `abort`. Without an id nobody can name it."""
        preparation, request_id = _Preparation(call.tenant), call.request_id
        if request_id in self._preparing or request_id in self._answers:
            raise DuplicateRequest(f"request {request_id} is in flight")
        if request_id:
            self._preparing[request_id] = preparation
        try:
            yield preparation
        finally:
            self._preparing.pop(request_id, None)


class _Bill:
    """Adds up what the choices of one call used, and settles when the last is over."""

    def __init__(self, num_open: int, settle: Callable[[int], None]) -> None:
        self._num_open = num_open
        self._num_tokens = 0
        self._settle: Callable[[int], None] | None = settle

    def add(self, num_tokens: int) -> None:
        self._num_open -= 1
        self._num_tokens += num_tokens
        if self._num_open == 0 and self._settle is not None:
            self._settle(self._num_tokens)

    def tear_up(self) -> None:
        """The call is refused after all: nothing will be settled."""
        self._settle = None


def _choice(request: GenerateRequest, base_id: RequestId, number: int, sibling: int) -> GenerateRequest:
    """Choice `number` of the whole call, which is number `sibling` of its prompt: a request of its own. Pure."""
    if number == 0:
        return request
    sampling = request.sampling
    if sibling:  # the prompt is scored once
        sampling = replace(sampling, seed=(sampling.seed + sibling) % MAX_SEED, prompt_logprobs=None)
    return replace(request, request_id=RequestId(f"{base_id}.{number}"), sampling=sampling)
