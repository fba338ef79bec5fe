"""Which open link to give up when there are too many: the idle one that was used longest ago."""

from collections import OrderedDict
from typing import Generic, TypeVar

P = TypeVar("P")


class LinkLru(Generic[P]):
    """The open links of one worker by peer. Pure but for that; not thread-safe.

    Life cycle: `touched` (opened, or used) -> `busy` (a transfer is on it) -> `idle` -> `closed`. Busy links are never
    given up; a peer may be busy with several transfers, and is idle when all of them ended.
    """

    def __init__(self, max_links: int) -> None:
        if max_links < 1:
            raise ValueError("max_links must be at least 1")
        self._max_links = max_links
        self._num_busy: OrderedDict[P, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._num_busy)

    def __contains__(self, peer: P) -> bool:
        return peer in self._num_busy

    @property
    def is_full(self) -> bool:
        """No link may be opened before another one is closed."""
        return len(self._num_busy) >= self._max_links

    def touched(self, peer: P) -> None:
        """The peer's link was opened or used."""
        self._num_busy.setdefault(peer, 0)
        self._num_busy.move_to_end(peer)

    def busy(self, peer: P) -> None:
        """One more transfer needs this link."""
        self.touched(peer)
        self._num_busy[peer] += 1

    def idle(self, peer: P) -> None:
        """One transfer less needs this link; nothing if it was closed meanwhile."""
        if self._num_busy.get(peer, 0) > 0:
            self._num_busy[peer] -= 1

    def closed(self, peer: P) -> None:
        """The link is gone, for whatever reason."""
        self._num_busy.pop(peer, None)

    def victim(self) -> P | None:
        """Return the peer whose link should be closed before another one is opened. Pure.

        Returns:
            None when there is room for one more, and when every link is busy (`is_full` tells which).
        """
        if not self.is_full:
            return None
        return next((peer for peer, num_busy in self._num_busy.items() if num_busy == 0), None)
