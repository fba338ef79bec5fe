"""What one gateway shares, in its own parts: credit and its columns in the worker table, sessions, circuit breakers.

Of the breakers only what this gateway saw itself is told: if each told what it had heard, a trip would go round among
them for ever.
"""

from collections.abc import Callable, Iterable, Sequence

from core.clock import Clock
from core.ids import Epoch, WorkerId
from core.membership import LoadReport
from router.forwarding.affinity import SessionAffinity
from router.forwarding.breaker import BreakerState, CircuitBreakers
from router.replicas.news import BindingNews, BreakerNews, CreditNews
from router.replicas.shared_state import ChangeNotes
from router.routing.credit import CreditLedger
from router.routing.table import Credit, WorkerTable

_NO_EPOCH = Epoch(0)
_STATES = frozenset(BreakerState)


class GatewayState:
    """Implements `router.replicas.shared_state.SharedState`.

    Args:
        epoch_of: tells the incarnation of a worker that this gateway knows; None: of no such worker.
    """

    def __init__(
        self,
        credit: CreditLedger,
        table: WorkerTable,
        affinity: SessionAffinity,
        breakers: CircuitBreakers,
        clock: Clock,
        *,
        epoch_of: Callable[[WorkerId], Epoch | None],
    ) -> None:
        self._credit = credit
        self._table = table
        self._affinity = affinity
        self._breakers = breakers
        self._clock = clock
        self._epoch_of = epoch_of
        self._tripped: set[WorkerId] = set()  # by what was seen here

    def tell(self, notes: ChangeNotes) -> None:
        """Note every change there from now on."""

        def on_breaker(worker_id: WorkerId) -> None:
            state, _ = self._breakers.state_of(worker_id, self._clock.now())
            (self._tripped.discard if state is BreakerState.CLOSED else self._tripped.add)(worker_id)
            notes.note_breaker(worker_id)

        self._credit.on_changed = notes.note_credit
        self._affinity.on_bound = notes.note_session
        self._breakers.on_changed = on_breaker

    def credited(self) -> Iterable[WorkerId]:
        return self._credit.workers()

    def credit(self, worker_id: WorkerId) -> CreditNews:
        own, row = self._credit.of(worker_id), self._table.row(worker_id)
        return CreditNews(
            worker_id,
            self._epoch(worker_id),
            own.num_requests,
            own.prefill_tokens,
            own.context_tokens,
            own.prefill_s,
            row.load if row is not None and row.load.sequence else None,
        )

    def set_peer_credit(self, credit: CreditNews) -> None:
        epoch = self._epoch(credit.worker_id) if credit.is_nothing else credit.epoch
        told = Credit(credit.num_requests, credit.prefill_tokens, credit.context_tokens, credit.prefill_s)
        self._table.set_peer_credit(credit.worker_id, epoch, told)

    def adopt_load(self, worker_id: WorkerId, epoch: Epoch, load: LoadReport) -> None:
        if epoch == self._epoch(worker_id):
            self._table.report(worker_id, load, self._clock.now())

    def sessions(self) -> Sequence[str]:
        return [session_id for session_id, _ in self._affinity.items(self._clock.now())]

    def binding(self, session_id: str) -> BindingNews | None:
        now = self._clock.now()
        bound = self._affinity.of(session_id, now)
        if bound is None:
            return None
        return BindingNews(session_id, bound.prefill, bound.decode, bound.expires_at - now)

    def adopt_binding(self, binding: BindingNews) -> None:
        self._affinity.adopt(
            binding.session_id, binding.prefill, binding.decode, binding.expires_in_s, self._clock.now()
        )

    def suspected(self) -> Iterable[WorkerId]:
        return self._tripped & set(self._breakers.not_closed())

    def breaker(self, worker_id: WorkerId) -> BreakerNews:
        state, open_for_s = self._breakers.state_of(worker_id, self._clock.now())
        return BreakerNews(worker_id, self._epoch(worker_id), state, open_for_s)

    def adopt_breaker(self, breaker: BreakerNews) -> None:
        if breaker.epoch == self._epoch(breaker.worker_id) and breaker.state in _STATES:
            state = BreakerState(breaker.state)
            self._breakers.adopt(breaker.worker_id, state, breaker.open_for_s, self._clock.now())

    def _epoch(self, worker_id: WorkerId) -> Epoch:
        return self._epoch_of(worker_id) or _NO_EPOCH
