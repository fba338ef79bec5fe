"""The shell of all request machines of one gateway: feeds them events, performs their effects, arms their timers.

submit -> AdmissionQueue -> (its turn) -> policy over the fleet's snapshot -> decode worker -> prefill worker
reports of workers -> the machine of the work they name -> tokens to the request's stream
"""

import asyncio
import logging
import random
from collections.abc import Callable

from core.alarm import Alarm
from core.clock import Clock
from core.errors import (
    Aborted,
    DuplicateRequest,
    InvalidTransition,
    NoWorkers,
    PromptTooLong,
    ProtocolError,
    RejectedError,
    RejectReason,
    ServingError,
    SlowReader,
    WorkerLost,
)
from core.ids import RequestId, WorkerId, new_nonce
from core.membership import Role
from core.request import Finish, GenerateRequest
from core.service_class import ServiceClass
from router import messages as m
from router.admission.claims import Claim, claim_bytes
from router.admission.output_lengths import LengthKey, OutputLengths
from router.admission.queue import AdmissionQueue, queue_rules
from router.config import RouterConfig
from router.fleet import Fleet
from router.forwarding.doors import DecodeOrder, PrefillOrder
from router.in_flight import ActiveRequest, InFlight
from router.lifecycle import RequestState
from router.messages import WorkEvents
from router.metrics import GatewayMetrics
from router.patience import Patience
from router.placement import Placer
from router.policy import NoCandidate, Obstacle
from router.prompt_hashes import PromptHashes
from router.service_terms import PLAIN_SERVICE, ServiceTerms
from router.state import RequestMachine
from router.stream import Completion, RequestStream

_log = logging.getLogger(__name__)


class Dispatcher:
    """All requests in flight. Implements `router.fleet.FleetListener`.

    Concurrency: the event loop's thread. Only `wait_idle` awaits.
    """

    def __init__(
        self, config: RouterConfig, fleet: Fleet, clock: Clock, rng: random.Random, metrics: GatewayMetrics
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._placer = Placer(config.routing, fleet, clock, rng)
        self._queue = AdmissionQueue(queue_rules(config), rng)
        self.output_lengths = OutputLengths(config.admission.output_lengths)
        self._requests = InFlight()
        self._is_pump_due = False
        self._gate_alarm = Alarm(clock, self._pump)
        self._gone_since: float | None = clock.now()  # since when a role has had no live worker
        self._gone_alarm = Alarm(clock, self._give_up_without_workers)
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False

    @property
    def placer(self) -> Placer:
        return self._placer

    @property
    def num_active(self) -> int:
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def num_on_worker(self, worker_id: WorkerId) -> int:
        """Requests that hold something on a worker."""
        return len(self._requests.on_worker(worker_id))

    def submit(
        self,
        request: GenerateRequest,
        hashes: PromptHashes,
        *,
        arrived_at: float,
        timeout_s: float,
        service: ServiceTerms = PLAIN_SERVICE,
        on_concluded: Callable[[int], None] | None = None,
    ) -> RequestStream:
        """Take a request whose parameters have been checked.

        Args:
            on_concluded: told once, however the request ends, how many tokens were delivered.

        Raises:
            DuplicateRequest, RejectedError: refused now; nothing was kept, and `on_concluded` will not be called.
        """
        now = self._clock.now()
        claim = self._claim(request, service, arrived_at)
        try:
            self._check_open(request.request_id)
            shed = self._queue.enter(claim, now)
        except ServingError as error:
            self._metrics.rejected(error)
            raise
        machine = RequestMachine(
            request.request_id,
            arrived_at=arrived_at,
            patience=Patience(
                deadline_at=arrived_at + timeout_s,
                accept_timeout_s=self._config.workers.accept_timeout_s,
                hold_timeout_s=self._config.workers.hold_timeout_s,
            ),
            max_losses=self._config.workers.max_losses,
        )
        stream = RequestStream(request.request_id, self._config.max_unread_tokens)
        active = ActiveRequest(request, service, claim, new_nonce(self._rng), hashes, machine, stream, on_concluded)
        active.alarm = Alarm(self._clock, lambda: self._perform_all(active, machine.poll(self._clock.now())))
        self._requests.add(active)
        self._idle.clear()
        self._metrics.active.set(len(self._requests))
        self._gone_alarm.arm(self._gone_deadline())
        self._feed(active, m.Queued())
        for loser in shed:
            self._end_queued(loser.request_id, loser.error)
        self._pump()
        return stream

    def abort(self, request_id: RequestId, error: ServingError) -> bool:
        """End a request early; its stream fails with `error`. Returns whether it was in flight."""
        active = self._requests.get(request_id)
        if active is None:
            return False
        self._feed(active, m.AbortRequested(error))
        return True

    def abandon(self, stream: RequestStream, error: ServingError) -> None:
        """End the request that `stream` belongs to, if it still runs: never another one that has its id by now."""
        active = self._requests.get(stream.request_id)
        if active is not None and active.stream is stream:
            self._feed(active, m.AbortRequested(error))

    def begin_drain(self) -> None:
        """Refuse what comes from now on."""
        self._is_draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Return True once nothing is in flight, False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self, error: ServingError) -> None:
        """End everything that is in flight."""
        for active in self._requests.all():
            self._feed(active, m.AbortRequested(error))
        self._gate_alarm.disarm()
        self._gone_alarm.disarm()

    # --- what the fleet tells ---

    def on_work_events(self, worker_id: WorkerId, events: WorkEvents) -> None:
        for work_id, event in events:
            active = self._requests.by_work(work_id)
            if active is None or worker_id not in active.workers:
                _log.debug("%s: late %s from %s", work_id, type(event).__name__, worker_id)
                continue
            match event:
                case m.DecodeAccepted() | m.PrefillAccepted():
                    self._fleet.credit.accepted(worker_id, work_id)
                case m.DecodeRejected(error) | m.PrefillRejected(error):
                    self._metrics.refused(error)
                case m.PrefillProduced():
                    self._fleet.credit.drop(worker_id, work_id)  # computed: no report needs to tell
                case m.KvLanded() if active.machine.prefill_worker is not None:
                    pair = (active.machine.prefill_worker, worker_id)
                    self._fleet.estimates.observe_transfer(*pair, event.kv_bytes, event.exposed_s)
                case _:
                    pass
            self._feed(active, event)

    def on_worker_down(self, worker_id: WorkerId, error: ServingError) -> None:
        self._metrics.worker_lost()
        lost = WorkerLost(f"lost worker {worker_id}: {error}")
        for active in self._requests.on_worker(worker_id):
            is_decode = active.machine.decode == worker_id
            self._feed(active, m.DecodeLost(lost) if is_decode else m.PrefillLost(lost))

    def on_fleet_changed(self) -> None:
        live = self._fleet.count_live()
        for role, count in live.items():
            self._metrics.workers.labels(role).set(count)
        if all(live.values()):
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = self._clock.now()
        self._gone_alarm.arm(self._gone_deadline())
        self._queue.note_capacity(self._clock.now())
        self._pump_soon()

    # --- the queue ---

    def check_admissible(self, request_id: str, tenant: str, service_class: ServiceClass) -> None:
        """Tell, before any work is done for it, whether even the smallest request would be refused now.

        Raises:
            DuplicateRequest, RejectedError
        """
        self._check_open(request_id)
        self._queue.check_room(Claim(RequestId(request_id), tenant, service_class, 0, None, self._clock.now(), 1, 0, 1))

    def _check_open(self, request_id: str) -> None:
        if self._is_draining:
            raise NoWorkers("this gateway is stopping")
        if request_id in self._requests:
            raise DuplicateRequest(f"request {request_id} is in flight")
        if len(self._requests) >= self._config.max_active_requests:
            bound = f"the gateway holds {self._config.max_active_requests} requests"
            raise RejectedError(RejectReason.QUEUE_FULL, bound, self._config.retry_max_s)
        gone_deadline = self._gone_deadline()
        if gone_deadline is not None and self._clock.now() >= gone_deadline:
            raise NoWorkers(self._missing_roles())

    def expected_output_tokens(self, request: GenerateRequest, service: ServiceTerms) -> int:
        """Return how long the answer will probably be."""
        return self.output_lengths.quantile(_length_key(request, service), 0.5)

    def _claim(self, request: GenerateRequest, service: ServiceTerms, arrived_at: float) -> Claim:
        expected = self.expected_output_tokens(request, service)
        return Claim(
            request.request_id,
            request.tenant,
            service.service_class,
            service.priority,
            service.slo.deadline_s,
            arrived_at,
            request.num_prompt_tokens,
            claim_bytes(request),
            expected,
        )

    def _end_queued(self, request_id: RequestId, error: ServingError) -> None:
        active = self._requests.get(request_id)
        assert active is not None, "the queue holds only requests in flight"
        self._feed(active, m.RequestFailed(error))

    def _gone_deadline(self) -> float | None:
        return None if self._gone_since is None else self._gone_since + self._config.no_workers_timeout_s

    def _missing_roles(self) -> str:
        return " and ".join(f"no live {role} worker" for role, count in self._fleet.count_live().items() if not count)

    def _give_up_without_workers(self) -> None:
        error = NoWorkers(self._missing_roles())
        for active in self._requests.all():
            if active.machine.state is RequestState.QUEUED:
                self._feed(active, m.RequestFailed(error))

    def _pump_soon(self) -> None:
        if not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pump_due = False
        for request_id in self._queue.take(self._clock.now()):
            active = self._requests.get(request_id)
            assert active is not None, "the queue holds only requests in flight"
            self._feed(active, m.Released())
        self._gate_alarm.arm(self._queue.next_deadline())
        self._metrics.queued.set(len(self._queue))

    # --- machines ---

    def _feed(self, active: ActiveRequest, event: m.Event) -> None:
        now = self._clock.now()
        try:
            effects = active.machine.handle(event, now)
        except (InvalidTransition, ProtocolError) as error:
            _log.error("%s: %s", active.request_id, error)
            broken = ProtocolError(f"a worker broke the protocol: {error}")
            effects = active.machine.handle(m.RequestFailed(broken), now)
        self._perform_all(active, effects)

    def _perform_all(self, active: ActiveRequest, effects: list[m.Effect]) -> None:
        for effect in effects:
            self._perform(active, effect)
        if active.alarm is not None:
            active.alarm.arm(active.machine.next_deadline())

    def _perform(self, active: ActiveRequest, effect: m.Effect) -> None:
        match effect:
            case m.Deliver(tokens):
                if not active.stream.push(tokens):
                    asyncio.get_running_loop().call_soon(self._cut_slow_reader, active)
            case m.ChooseWorkers(refused):
                self._choose(active, refused)
            case m.ChoosePrefill(refused, decode):
                self._choose_prefill(active, refused, decode)
            case m.ChooseDecode():
                raise AssertionError("not yet")
            case m.SubmitDecode():
                self._submit_decode(active, effect)
            case m.SubmitPrefill():
                self._submit_prefill(active, effect)
            case m.SubmitAlone():
                self._submit_alone(active, effect)
            case m.BindPrefill(worker_id, decode):
                self._bind(active, worker_id, decode)
            case m.AbortWork(worker_id, reason):
                self._fleet.doors.abort(worker_id, active.work_id, reason)
                self._let_go(active, worker_id)
            case m.ReleaseWorker(worker_id):
                self._let_go(active, worker_id)
            case m.ReturnToQueue(cause, retry_after_s):
                _log.debug("%s: back to the queue, %s", active.request_id, cause)
                self._requests.end_attempt(active)
                self._queue.put_back(active.claim, self._clock.now(), retry_after_s)
                self._pump_soon()
            case m.LeaveQueue():
                self._queue.leave(active.request_id, self._clock.now())
                self._pump_soon()
            case m.Conclude(finish, error):
                self._conclude(active, finish, error)

    def _choose(self, active: ActiveRequest, refused: frozenset[WorkerId]) -> None:
        outcome = self._placer.place(active.request, active.hashes, refused=refused, reserved_decode=None)
        if isinstance(outcome, NoCandidate):
            self._nobody(active, outcome)
            return
        active.decision = outcome
        self._metrics.decided(outcome)
        winner = outcome.winner
        if winner.decode is None:
            self._feed(active, m.PrefillAloneChosen(winner.prefill))
        else:
            self._feed(active, m.PairChosen(winner.prefill, winner.decode))

    def _choose_prefill(self, active: ActiveRequest, refused: frozenset[WorkerId], decode: WorkerId) -> None:
        outcome = self._placer.place(active.request, active.hashes, refused=refused, reserved_decode=decode)
        if isinstance(outcome, NoCandidate):
            self._nobody(active, outcome)
            return
        active.decision = outcome
        self._metrics.decided(outcome)
        self._feed(active, m.PrefillChosen(outcome.winner.prefill))

    def _nobody(self, active: ActiveRequest, outcome: NoCandidate) -> None:
        request = active.request
        if outcome.obstacle is Obstacle.TOO_LONG or active.machine.is_too_long:
            total = request.num_prompt_tokens + request.sampling.max_tokens
            problem = f"no {outcome.role} worker can hold a request of {total} tokens"
            self._feed(active, m.RequestFailed(PromptTooLong("prompt", problem)))
        else:
            self._feed(active, m.NothingFits(f"{outcome.role}: {outcome.obstacle}"))

    def _submit_decode(self, active: ActiveRequest, effect: m.SubmitDecode) -> None:
        self._requests.begin_attempt(active, effect.attempt)
        if effect.prefill is not None:
            self._count_prefill(active, effect.prefill)  # now: the next of a burst must not see an idle worker
        self._count(active, effect.worker_id, prefill_tokens=0)
        self._requests.hold(active, effect.worker_id)
        order = DecodeOrder(active.work_id, active.request, self._hashes(active, effect.worker_id))
        if not self._fleet.doors.submit_decode(effect.worker_id, order):
            self._feed(active, m.DecodeLost(WorkerLost(f"{effect.worker_id} is not connected")))

    def _submit_prefill(self, active: ActiveRequest, effect: m.SubmitPrefill) -> None:
        self._requests.begin_attempt(active, effect.attempt)
        cached_tokens = self._count_prefill(active, effect.worker_id)
        self._requests.hold(active, effect.worker_id)
        record = self._fleet.records.get(effect.decode) if effect.decode is not None else None
        order = PrefillOrder(
            active.work_id,
            active.request,
            self._hashes(active, effect.worker_id),
            record,
            cached_tokens,
            bind_later=effect.decode is None,
        )
        is_known = effect.decode is None or record is not None
        if not is_known or not self._fleet.doors.submit_prefill(effect.worker_id, order):
            self._feed(active, m.PrefillLost(WorkerLost(f"{effect.worker_id} is not connected")))

    def _submit_alone(self, active: ActiveRequest, effect: m.SubmitAlone) -> None:
        self._requests.begin_attempt(active, effect.attempt)
        cached_tokens = self._count_prefill(active, effect.worker_id)
        self._requests.hold(active, effect.worker_id)
        hashes, lost = self._hashes(active, effect.worker_id), WorkerLost(f"{effect.worker_id} is not connected")
        if effect.role is Role.DECODE:
            whole = DecodeOrder(active.work_id, active.request, hashes, generate=True)
            if not self._fleet.doors.submit_decode(effect.worker_id, whole):
                self._feed(active, m.DecodeLost(lost))
        else:
            order = PrefillOrder(active.work_id, active.request, hashes, None, cached_tokens)
            if not self._fleet.doors.submit_prefill(effect.worker_id, order):
                self._feed(active, m.PrefillLost(lost))

    def _bind(self, active: ActiveRequest, worker_id: WorkerId, decode: WorkerId | None) -> None:
        record = self._fleet.records.get(decode) if decode is not None else None
        is_known = decode is None or record is not None
        if not is_known or not self._fleet.doors.bind(worker_id, active.work_id, record):
            self._feed(active, m.PrefillLost(WorkerLost(f"{worker_id} is not connected")))

    def _count_prefill(self, active: ActiveRequest, worker_id: WorkerId) -> int:
        """The prompt counts as the worker's load from now on; returns how much of it the worker should have cached."""
        held_tokens = self._fleet.held_tokens(active.hashes).get(worker_id, 0)
        self._count(active, worker_id, prefill_tokens=max(1, active.request.num_prompt_tokens - held_tokens))
        return held_tokens

    def _count(self, active: ActiveRequest, worker_id: WorkerId, *, prefill_tokens: int) -> None:
        """The work counts as the worker's load from now on."""
        context_tokens = active.request.num_prompt_tokens
        self._fleet.credit.add(worker_id, active.work_id, prefill_tokens=prefill_tokens, context_tokens=context_tokens)

    def _hashes(self, active: ActiveRequest, worker_id: WorkerId) -> tuple[bytes, ...]:
        """Return the block hashes that this worker's cache is keyed by."""
        return active.hashes.of(self._fleet.hash_key(worker_id))

    def _let_go(self, active: ActiveRequest, worker_id: WorkerId) -> None:
        self._fleet.credit.drop(worker_id, active.work_id)
        self._requests.let_go(active, worker_id)

    def _cut_slow_reader(self, active: ActiveRequest) -> None:
        error = SlowReader(f"more than {self._config.max_unread_tokens} tokens were left unread")
        if self._requests.get(active.request_id) is active:
            self._feed(active, m.AbortRequested(error))
            active.stream.fail(error, drop_unread=True)

    def _conclude(self, active: ActiveRequest, finish: Finish | None, error: ServingError | None) -> None:
        self._requests.remove(active)
        now = self._clock.now()
        self._queue.end(active.request_id, now, active.machine.num_tokens)
        self._queue.note_capacity(now)
        self._metrics.active.set(len(self._requests))
        if finish is not None:
            completion = self._complete(active, finish)
            self._metrics.finished(completion)
            self.output_lengths.record(_length_key(active.request, active.service), active.machine.num_tokens, now)
            active.stream.finish(completion)
        elif error is not None:
            outcome = "aborted" if isinstance(error, Aborted | SlowReader) else "failed"
            self._metrics.failed(outcome, error, active.machine.num_tokens)
            _log.info("%s: %s after %d tokens: %s", active.request_id, outcome, active.machine.num_tokens, error)
            active.stream.fail(error)
        if active.on_concluded is not None:
            active.on_concluded(active.machine.num_tokens)
        if not len(self._requests):
            self._idle.set()
        self._pump_soon()

    def _complete(self, active: ActiveRequest, finish: Finish) -> Completion:
        machine = active.machine
        return Completion(
            finish=finish,
            prompt_tokens=active.request.num_prompt_tokens,
            completion_tokens=machine.num_tokens,
            cached_tokens=machine.cached_tokens,
            timing=machine.timeline.split(machine.num_tokens, self._clock.now()),
            landed=machine.landed,
            prefill_worker=machine.prefill_worker,
            decode_worker=machine.decode_worker,
            reason=active.decision.reason if active.decision is not None else "",
            num_asked=machine.num_asked,
        )


def _length_key(request: GenerateRequest, service: ServiceTerms) -> LengthKey:
    return LengthKey(request.tenant, service.service_class, request.sampling.max_tokens)
