"""The sending side of one prompt's KV: pieces leave as they are ready, once it is known where they go."""

from collections.abc import Callable

from simulator.virtual_time import VirtualLoop
from simulator.wire import KvLink


class HandOff:
    """One transfer.

    Args:
        on_landed: called when the last piece is there; given the bytes that crossed.
    """

    def __init__(
        self, loop: VirtualLoop, link: KvLink, bytes_per_token: int, num_tokens: int, on_landed: Callable[[int], None]
    ) -> None:
        self._loop = loop
        self._link = link
        self._bytes_per_token = bytes_per_token
        self._num_tokens = num_tokens
        self._on_landed = on_landed
        self._unsent: list[tuple[int, int, float]] = []  # (first token, token after the last, ready from)
        self._num_ready = 0
        self._held_tokens: int | None = None  # at the receiver; None: not bound
        self._bytes_per_s = 0.0  # to there
        self._num_sent_bytes = 0
        self._landed_at = loop.now()
        self._is_over = False

    @property
    def is_bound(self) -> bool:
        return self._held_tokens is not None

    def bind(self, held_tokens: int, bytes_per_s: float) -> None:
        """It is known where the KV goes, how many leading tokens are there already, and how fast it gets there."""
        assert not self.is_bound
        self._held_tokens = held_tokens
        self._bytes_per_s = bytes_per_s
        pieces, self._unsent = self._unsent, []
        for first, after, ready_from in pieces:
            self._send(first, after, ready_from)
        self._end_if_complete()

    def ready(self, after: int, ready_from: float) -> None:
        """All tokens before `after` are computed now; the new ones became so from `ready_from` on."""
        first, self._num_ready = self._num_ready, after
        if self.is_bound:
            self._send(first, after, ready_from)
            self._end_if_complete()
        else:
            self._unsent.append((first, after, ready_from))

    def abandon(self) -> None:
        """Nobody wants it any more."""
        self._is_over = True

    def _send(self, first: int, after: int, ready_from: float) -> None:
        assert self._held_tokens is not None
        num_bytes = max(0, after - max(first, self._held_tokens)) * self._bytes_per_token
        if num_bytes and not self._is_over:
            self._num_sent_bytes += num_bytes
            now = self._loop.now()
            self._landed_at = self._link.send(num_bytes, self._bytes_per_s, ready_from=ready_from, ready_at=now)

    def _end_if_complete(self) -> None:
        if self._num_ready == self._num_tokens and not self._is_over:
            self._loop.call_at(max(self._landed_at, self._loop.now()), self._land)

    def _land(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_landed(self._num_sent_bytes)
