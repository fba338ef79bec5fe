"""What a gateway shares, as plain dictionaries: own knowledge to tell, and what the others were heard to say."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from core.ids import Epoch, WorkerId
from core.membership import LoadReport
from router.replicas.news import BindingNews, BreakerNews, CreditNews
from tests.fakes.script import PATIENCE_S


class FakeSharedState:
    """Implements `router.replicas.shared_state.SharedState`."""

    def __init__(self) -> None:
        self.own: dict[WorkerId, CreditNews] = {}
        self.peers: dict[WorkerId, CreditNews] = {}  # nothing is not kept
        self.loads: dict[WorkerId, LoadReport] = {}  # heard of
        self.bound: dict[str, BindingNews] = {}
        self.breakers: dict[WorkerId, BreakerNews] = {}
        self.adopted_breakers: dict[WorkerId, BreakerNews] = {}
        self._heard = asyncio.Event()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the peers' credit brings about."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._heard.clear()
                await self._heard.wait()

    def credited(self) -> Iterable[WorkerId]:
        return self.own.keys()

    def credit(self, worker_id: WorkerId) -> CreditNews:
        return self.own.get(worker_id, CreditNews(worker_id, Epoch(1)))

    def set_peer_credit(self, credit: CreditNews) -> None:
        self.peers.pop(credit.worker_id, None)
        if not credit.is_nothing:
            self.peers[credit.worker_id] = credit
        self._heard.set()

    def adopt_load(self, worker_id: WorkerId, epoch: Epoch, load: LoadReport) -> None:
        self.loads[worker_id] = load

    def sessions(self) -> Sequence[str]:
        return list(reversed(self.bound))

    def binding(self, session_id: str) -> BindingNews | None:
        return self.bound.get(session_id)

    def adopt_binding(self, binding: BindingNews) -> None:
        self.bound[binding.session_id] = binding

    def suspected(self) -> Iterable[WorkerId]:
        return self.breakers.keys()

    def breaker(self, worker_id: WorkerId) -> BreakerNews:
        return self.breakers.get(worker_id, BreakerNews(worker_id, Epoch(1), "closed"))

    def adopt_breaker(self, breaker: BreakerNews) -> None:
        self.adopted_breakers[breaker.worker_id] = breaker
