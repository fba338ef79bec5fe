"""The port to what gateways share. The gateway's own implementation is `router.replicas.gateway_state`."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from core.ids import Epoch, WorkerId
from core.membership import LoadReport
from router.replicas.news import BindingNews, BreakerNews, CreditNews


class SharedState(Protocol):
    """Read to tell the others, written by what they tell. What is written is not told again as this gateway's own.

    Concurrency: the event loop's thread; nothing blocks.
    """

    def credited(self) -> Iterable[WorkerId]:
        """Return the workers that this gateway's own credit is with."""
        ...

    def credit(self, worker_id: WorkerId) -> CreditNews:
        """Return this gateway's own credit with a worker (nothing is an answer too), and the load it knows."""
        ...

    def set_peer_credit(self, credit: CreditNews) -> None:
        """This is what all others sent to the worker and no load report includes; it replaces what was said before."""
        ...

    def adopt_load(self, worker_id: WorkerId, epoch: Epoch, load: LoadReport) -> None:
        """Another gateway was told this; it may be older than what is known here."""
        ...

    def sessions(self) -> Sequence[str]:
        """Return the sessions that are bound, the most recently used first, whoever bound them."""
        ...

    def binding(self, session_id: str) -> BindingNews | None:
        """Return a session's workers; None when it has lapsed."""
        ...

    def adopt_binding(self, binding: BindingNews) -> None: ...

    def suspected(self) -> Iterable[WorkerId]:
        """Return the workers whose breaker is not closed by what this gateway saw itself."""
        ...

    def breaker(self, worker_id: WorkerId) -> BreakerNews:
        """Return how this gateway thinks of a worker."""
        ...

    def adopt_breaker(self, breaker: BreakerNews) -> None: ...


class ChangeNotes(Protocol):
    """Who is told that there is something new to tell the others."""

    def note_credit(self, worker_id: WorkerId) -> None:
        """This gateway's own credit with a worker changed, or the load it knows of it."""
        ...

    def note_session(self, session_id: str) -> None:
        """This gateway bound a session."""
        ...

    def note_breaker(self, worker_id: WorkerId) -> None:
        """This gateway thinks otherwise of a worker than before."""
        ...
