"""The other gateways as one gateway knows them. Pure: news and the time come in, what changed comes out.

Life of a peer: its first news makes it known; news seen before (the stream is read again after an outage) is dropped
by its number; silence, or its leaving, makes it forgotten, and with it its credit. A restarted gateway has a new id.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from core.ids import Epoch, GatewayId, WorkerId
from router.replicas.news import CreditNews, News


@dataclass(slots=True)
class _Peer:
    sequence: int = 0
    heard_at: float = 0.0
    credits: dict[WorkerId, CreditNews] = field(default_factory=dict)


class PeerBook:
    """What the peers said last.

    Args:
        silent_after_s: nothing that a peer said is believed after so long a silence.
    """

    def __init__(self, silent_after_s: float) -> None:
        self._silent_after_s = silent_after_s
        self._peers: dict[GatewayId, _Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def gateways(self) -> Iterable[GatewayId]:
        return self._peers.keys()

    def age_s(self, now: float) -> float:
        """Return how long the quietest peer has been silent; 0 without peers."""
        return max((now - peer.heard_at for peer in self._peers.values()), default=0.0)

    def absorb(self, news: News, now: float) -> set[WorkerId] | None:
        """Take news in. Returns the workers whose credit may be another now; None when the news is an old one."""
        peer = self._peers.get(news.gateway_id)
        if peer is not None and news.sequence <= peer.sequence:
            return None
        if news.is_leaving:
            return self._forget(news.gateway_id)
        if peer is None:
            peer = self._peers[news.gateway_id] = _Peer()
        peer.sequence = news.sequence
        peer.heard_at = now
        touched = {one.worker_id for one in news.credits}
        if news.is_whole:
            touched |= peer.credits.keys()
            peer.credits.clear()
        for one in news.credits:
            if one.is_nothing:
                peer.credits.pop(one.worker_id, None)
            else:
                peer.credits[one.worker_id] = replace(one, load=None)
        return touched

    def lapse(self, now: float) -> set[WorkerId]:
        """Forget who is silent. Returns the workers whose credit may be another now."""
        silent = [name for name, peer in self._peers.items() if now - peer.heard_at >= self._silent_after_s]
        return {worker_id for name in silent for worker_id in self._forget(name)}

    def credit(self, worker_id: WorkerId) -> CreditNews:
        """Return what all peers together sent to the newest incarnation of a worker that any of them knows."""
        told = [peer.credits[worker_id] for peer in self._peers.values() if worker_id in peer.credits]
        total = CreditNews(worker_id, max((one.epoch for one in told), default=Epoch(0)))
        for one in told:
            if one.epoch == total.epoch:
                total = total.plus(one)
        return total

    def check(self) -> None:
        """Assert the invariants."""
        for peer in self._peers.values():
            assert peer.sequence > 0
            assert not any(one.is_nothing for one in peer.credits.values())

    def _forget(self, name: GatewayId) -> set[WorkerId]:
        peer = self._peers.pop(name, None)
        return set(peer.credits) if peer is not None else set()
