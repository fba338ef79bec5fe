"""The shell of all request machines of one gateway: feeds them events, performs their effects, arms their timers.

submit -> door -> AdmissionQueue -> (its turn) -> policy over the table of workers -> decode and prefill workers
reports of workers -> what they teach -> the machine of the work they name -> tokens to the request's stream
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

from core.alarm import Alarm
from core.clock import Clock
from core.errors import (
    DuplicateRequest,
    InvalidTransition,
    NoWorkers,
    ProtocolError,
    RejectedError,
    RejectReason,
    ServingError,
    SlowReader,
    WorkerLost,
)
from core.ids import RequestId, WorkerId, new_nonce
from core.request import Finish, GenerateRequest
from core.service_class import ServiceClass
from router import messages as m
from router.admission.claims import Claim
from router.admission.queue import AdmissionQueue, queue_rules
from router.config import RouterConfig
from router.fleet import Fleet
from router.forwarding.absence import WorkerAbsence, missing
from router.forwarding.affinity import SessionAffinity
from router.forwarding.breaker_watch import BreakerWatch
from router.forwarding.completing import complete
from router.forwarding.entrance import Entrance
from router.forwarding.findings import Findings
from router.forwarding.late_bound import LateBound
from router.forwarding.placing import Placing
from router.forwarding.predictions import Predictions
from router.forwarding.sender import Sender
from router.forwarding.turns import Turns
from router.in_flight import ActiveRequest, InFlight
from router.lifecycle import RequestState
from router.metrics import GatewayMetrics
from router.patience import Patience
from router.prompt_hashes import PromptHashes
from router.routing.modes import Mode
from router.routing.placer import Placer
from router.service_terms import PLAIN_SERVICE, ServiceTerms
from router.state import RequestMachine
from router.stream import RequestStream

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
        self.placer = Placer(
            config.routing, clock, rng, fleet.table, fleet.models.links, fleet.index, lambda: fleet.staleness_s
        )
        self.affinity = SessionAffinity(config.forwarding.affinity)
        self._requests = InFlight()
        self._queue = AdmissionQueue(queue_rules(config), rng)
        self._late_bound = LateBound(config.forwarding.max_late_bound)
        self._turns = Turns(self._queue, self._late_bound, self._requests, clock, metrics, feed=self._feed)
        self._watch = BreakerWatch(config.forwarding.breaker, fleet, clock, rng, on_rested=self._turns.note_capacity)
        self.breakers = self._watch.breakers
        self._entrance = Entrance(config, self._queue, self.placer, metrics)
        self.predictions = Predictions(fleet.index, config.forwarding.predicted_ttl_s)
        self._sender = Sender(fleet, self._requests, self.breakers, self.predictions, clock)
        self._placing = Placing(config, fleet, self.placer, self.affinity, clock, rng, metrics)
        self._findings = Findings(fleet, self.breakers, self.predictions, self.placer.explanations, metrics)
        self._absence = WorkerAbsence(
            is_alone_allowed=Mode.COLOCATED in config.routing.modes,
            patience_s=config.no_workers_timeout_s,
            now=clock.now(),
        )
        self._gone_alarm = Alarm(clock, self._give_up_without_workers)
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False

    @property
    def num_active(self) -> int:
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def observe(self) -> None:
        """Set the gauges that no event sets."""
        self._metrics.forwarding(self._queue.queued_by_class(), len(self._late_bound), len(self.breakers.not_closed()))

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
            on_concluded: told once, however the request ends, how many tokens of prompt and output it used: none if
                no worker ever took it.

        Raises:
            DuplicateRequest, RejectedError: refused now; nothing was kept, and `on_concluded` will not be called.
        """
        now = self._clock.now()
        self._fleet.note_prompt(hashes)
        claim = self._entrance.claim(request, service, arrived_at)
        try:
            self._check_open(request.request_id)
            self._entrance.check_door(request, hashes, service, claim, now)
            shed = self._queue.enter(claim, now)
        except ServingError as error:
            self._metrics.rejected(error)
            raise
        workers = self._config.workers
        patience = Patience(
            deadline_at=arrived_at + timeout_s,
            accept_timeout_s=workers.accept_timeout_s,
            hold_timeout_s=workers.hold_timeout_s,
        )
        machine = RequestMachine(
            request.request_id, arrived_at=arrived_at, patience=patience, max_losses=workers.max_losses
        )
        stream = RequestStream(request.request_id, self._config.max_unread_tokens)
        active = ActiveRequest(request, service, claim, new_nonce(self._rng), hashes, machine, stream, on_concluded)
        active.alarm = Alarm(self._clock, lambda: self._perform_all(active, machine.poll(self._clock.now())))
        self._requests.add(active)
        self._idle.clear()
        self._metrics.active.set(len(self._requests))
        self._gone_alarm.arm(self._absence.deadline())
        self._feed(active, m.Queued())
        for loser in shed:
            self._feed(self._requests.queued(loser.request_id), m.RequestFailed(loser.error))
        self._turns.run()
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

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def begin_drain(self) -> None:
        """Refuse what comes from now on."""
        self._is_draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Return True once nothing is in flight, False after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()

    def close(self, error: ServingError) -> None:
        """End everything that is in flight."""
        for active in self._requests.all():
            self._feed(active, m.AbortRequested(error))
        self._turns.close()
        self._watch.close()
        self._gone_alarm.disarm()

    # --- what the fleet tells ---

    def on_work_events(self, worker_id: WorkerId, events: m.WorkEvents) -> None:
        now = self._clock.now()
        for work_id, event in events:
            active = self._requests.by_work(work_id)
            if active is None or worker_id not in active.workers:
                _log.debug("%s: late %s from %s", work_id, type(event).__name__, worker_id)
                continue
            self._findings.note(worker_id, active, event, now)
            self._feed(active, event)

    def on_room(self, worker_id: WorkerId) -> None:
        self._turns.note_room()

    def on_worker_down(self, worker_id: WorkerId, error: ServingError) -> None:
        self._metrics.worker_lost()
        lost = WorkerLost(f"lost worker {worker_id}: {error}")
        if losers := self._requests.on_worker(worker_id):
            self.breakers.failed(worker_id, self._clock.now())
        for active in losers:
            self._feed(active, m.DecodeLost(lost) if active.machine.decode == worker_id else m.PrefillLost(lost))

    def on_fleet_changed(self) -> None:
        live, now = self._fleet.count_live(), self._clock.now()
        for role, count in live.items():
            self._metrics.workers.labels(role).set(count)
        self._absence.note(live, now)
        self._gone_alarm.arm(self._absence.deadline())
        self._turns.note_capacity()

    # --- who may come in ---

    def can_serve(self) -> bool:
        """Somebody can be asked now."""
        return self._absence.can_serve(self._fleet.count_live())

    def expected_output_tokens(self, request: GenerateRequest, service: ServiceTerms) -> int:
        """Predict how long the answer becomes."""
        return self._entrance.expected_output_tokens(request, service)

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
        if self._absence.has_lasted(self._clock.now()):
            raise missing(self._fleet.count_live())

    def _give_up_without_workers(self) -> None:
        error = missing(self._fleet.count_live())
        for active in self._requests.all():
            if active.machine.state is RequestState.QUEUED:
                self._feed(active, m.RequestFailed(error))

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
        following: m.Event | None = None
        match effect:
            case m.Deliver(tokens, prompt_tokens):
                if not active.stream.push(tokens, prompt_tokens):
                    asyncio.get_running_loop().call_soon(self._cut_slow_reader, active)
            case m.ChooseWorkers(refused):
                following = self._choose(active, refused)
            case m.ChoosePrefill(refused, decode):
                following = self._placing.choose(active, refused, decode)
            case m.ChooseDecode():
                following = self._placing.choose_decode(active, effect)
            case m.SubmitDecode():
                following = self._sender.reserve(active, effect)
            case m.SubmitPrefill():
                following = self._sender.dispatch(active, effect)
            case m.SubmitAlone():
                following = self._sender.engage(active, effect)
            case m.BindPrefill():
                self._late_bound.discard(active)
                following = self._sender.bind(active, effect)
                self._turns.note_room()
            case m.AbortWork(worker_id, reason):
                self._sender.abort(active, worker_id, reason)
            case m.ReleaseWorker(worker_id):
                self._sender.let_go(active, worker_id)
            case m.BlameWorker(worker_id):
                self.breakers.failed(worker_id, self._clock.now())
            case m.ReturnToQueue(cause, retry_after_s):
                _log.debug("%s: back to the queue, %s", active.request_id, cause)
                self._requests.end_attempt(active)
                self._late_bound.discard(active)
                self._queue.put_back(active.claim, self._clock.now(), retry_after_s)
                self._turns.soon()
            case m.LeaveQueue():
                self._queue.leave(active.request_id, self._clock.now())
                self._placing.bind_session(active)
                self._turns.soon()
            case m.Conclude(finish, error):
                self._conclude(active, finish, error)
        if following is not None:
            self._feed(active, following)

    def _choose(self, active: ActiveRequest, refused: frozenset[WorkerId]) -> m.Event:
        self._late_bound.discard(active)
        chosen = self._placing.choose(active, refused, allow_late=self._late_bound.has_room)
        if isinstance(chosen, m.LateChosen):
            self._late_bound.add(active)
        return chosen

    def _cut_slow_reader(self, active: ActiveRequest) -> None:
        error = SlowReader(f"more than {self._config.max_unread_tokens} tokens were left unread")
        if self._requests.get(active.request_id) is active:
            self._feed(active, m.AbortRequested(error))
            active.stream.fail(error, drop_unread=True)

    def _conclude(self, active: ActiveRequest, finish: Finish | None, error: ServingError | None) -> None:
        now, machine = self._clock.now(), active.machine
        self._requests.remove(active)
        self._late_bound.discard(active)
        self._queue.end(active.request_id, now, machine.num_tokens)
        self._metrics.active.set(len(self._requests))
        self._findings.concluded(active, error, now)
        if finish is not None:
            completion = complete(active, finish, now)
            self._metrics.finished(completion)
            self._entrance.ended_well(active.request, active.service, machine.num_tokens, now)
            active.stream.finish(completion)
        elif error is not None:
            self._metrics.failed(error, machine.num_tokens)
            _log.info("%s: %s after %d tokens: %s", active.request_id, machine.state, machine.num_tokens, error)
            active.stream.fail(error)
        if active.on_concluded is not None:
            active.on_concluded(active.request.num_prompt_tokens + machine.num_tokens if machine.was_taken else 0)
        if not len(self._requests):
            self._idle.set()
        self._turns.note_capacity()
