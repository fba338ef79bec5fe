"""How many links a sender keeps open: at the cap, an idle one is closed to make room, the least recently used first.

A link is idle when its peer has no live transfer. It belongs to its own sender thread, so it is asked to close; whoever
needs the room waits until it has. When every link is busy, the one who needs room waits for a transfer to end, and
gives up after a while.
"""

import threading
from collections import Counter
from typing import Protocol

from kv_transfer.link import LinkError
from kv_transfer.sender.link_lru import LinkLru
from kv_transfer.session import NackReason


class QuotaExceeded(LinkError):
    """Every link that may be open is busy."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.nack_reason = NackReason.TOO_MANY_LINKS


class LinkHolder(Protocol):
    """The sender thread of one peer."""

    def give_up_link(self) -> None:
        """Close the link soon if nothing needs it; `LinkQuota.closed` follows. Must not block."""
        ...


class LinkQuota:
    """The open links of one sender. All methods: any thread; only `open` blocks."""

    def __init__(self, max_links: int) -> None:
        self._changed = threading.Condition()
        self._max_links = max_links
        self._lru: LinkLru[str] = LinkLru(max_links)
        self._holders: dict[str, LinkHolder] = {}
        self._transfers: Counter[str] = Counter()

    def began(self, peer: str) -> None:
        """A transfer to this peer is live."""
        with self._changed:
            self._transfers[peer] += 1
            if peer in self._lru:
                self._lru.busy(peer)

    def ended(self, peer: str) -> None:
        with self._changed:
            self._transfers[peer] -= 1
            if not self._transfers[peer]:
                del self._transfers[peer]
            if peer in self._lru:
                self._lru.idle(peer)
            self._changed.notify_all()

    def open(self, peer: str, holder: LinkHolder, timeout_s: float) -> None:
        """Take a place for a link to be opened, waiting for one if need be. Does nothing when it has one.

        Raises:
            QuotaExceeded: there was none in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_place(peer), timeout_s):
                raise QuotaExceeded(f"all {self._max_links} links are busy")
            self._lru.closed(peer)  # an earlier thread's place, if that is not through yet: nothing counts twice
            self._lru.touched(peer)
            self._holders[peer] = holder
            for _ in range(self._transfers[peer]):
                self._lru.busy(peer)

    def closed(self, peer: str, holder: LinkHolder) -> None:
        """The place is free again. Ignored from whoever does not have it any more."""
        with self._changed:
            if self._holders.get(peer) is holder:
                del self._holders[peer]
                self._lru.closed(peer)
                self._changed.notify_all()

    def _has_place(self, peer: str) -> bool:
        if peer in self._lru or not self._lru.is_full:
            return True
        victim = self._lru.victim()
        if victim is not None:
            self._holders[victim].give_up_link()
        return False
