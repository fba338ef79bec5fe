"""The requests in the gateway, and who holds what of them: by request, by work id on the wire, by worker.

A work id names one attempt of one admission of a request: "<id>/0.<nonce>", "<id>/1.<nonce>", ... (a client's own id
has no slash), and is the transfer id of that attempt too. Neither a request id that a client uses again nor another
gateway's request of the same id meets it. Reports that name an unknown work are late news of a finished attempt."""

from collections.abc import Callable
from dataclasses import dataclass, field

from core.alarm import Alarm
from core.ids import Epoch, RequestId, TransferId, WorkerId, transfer_id
from core.request import GenerateRequest
from router.admission.claims import Claim
from router.prompt_hashes import PromptHashes
from router.routing.decision import Decision
from router.service_terms import ServiceTerms
from router.state import RequestMachine
from router.stream import RequestStream

_NO_WORK = TransferId("")


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """One request with all that the shell keeps for it. `work_id` is empty before the first attempt.

    `asked_epochs`: of the decode workers that were asked to reserve, the incarnation that was.
    """

    request: GenerateRequest
    service: ServiceTerms
    claim: Claim
    nonce: str
    hashes: PromptHashes
    machine: RequestMachine
    stream: RequestStream
    on_concluded: Callable[[int], None] | None = None
    alarm: Alarm | None = None
    decision: Decision | None = None  # the last placement
    placed: Decision | None = None  # the last one that was counted
    queued_tokens: int = 0  # that waited then, as far as known, at the worker that was to compute the prompt
    decode_decision: Decision | None = None  # the last choice of a decode worker alone
    decided_at: float = 0.0
    work_id: TransferId = _NO_WORK
    workers: set[WorkerId] = field(default_factory=set)
    asked_epochs: dict[WorkerId, Epoch] = field(default_factory=dict)

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id


class InFlight:
    """The three ways to find a request."""

    def __init__(self) -> None:
        self._by_id: dict[RequestId, ActiveRequest] = {}
        self._by_work: dict[str, ActiveRequest] = {}
        self._by_worker: dict[WorkerId, dict[RequestId, ActiveRequest]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def get(self, request_id: RequestId) -> ActiveRequest | None:
        return self._by_id.get(request_id)

    def queued(self, request_id: RequestId) -> ActiveRequest:
        """Return one that the queue holds: it is in flight."""
        return self._by_id[request_id]

    def by_work(self, work_id: str) -> ActiveRequest | None:
        return self._by_work.get(work_id)

    def on_worker(self, worker_id: WorkerId) -> list[ActiveRequest]:
        """Return the requests that hold, or were asked to hold, something on a worker."""
        return list(self._by_worker.get(worker_id, {}).values())

    def all(self) -> list[ActiveRequest]:
        return list(self._by_id.values())

    def add(self, active: ActiveRequest) -> None:
        self._by_id[active.request_id] = active

    def remove(self, active: ActiveRequest) -> None:
        """Forget a request that holds nothing any more."""
        assert not active.workers, f"{active.request_id} still holds {active.workers}"
        del self._by_id[active.request_id]
        self._by_work.pop(active.work_id, None)

    def begin_attempt(self, active: ActiveRequest, attempt: int) -> None:
        """Name the work after its attempt; the name of the last attempt is forgotten."""
        self.end_attempt(active)
        active.work_id = transfer_id(active.request_id, attempt, active.nonce)
        self._by_work[active.work_id] = active

    def end_attempt(self, active: ActiveRequest) -> None:
        """Nobody holds anything of the last attempt: what is still told of it is late news."""
        self._by_work.pop(active.work_id, None)
        active.work_id = _NO_WORK

    def hold(self, active: ActiveRequest, worker_id: WorkerId) -> None:
        active.workers.add(worker_id)
        self._by_worker.setdefault(worker_id, {})[active.request_id] = active

    def let_go(self, active: ActiveRequest, worker_id: WorkerId) -> None:
        active.workers.discard(worker_id)
        holders = self._by_worker.get(worker_id, {})
        holders.pop(active.request_id, None)
        if not holders:
            self._by_worker.pop(worker_id, None)
