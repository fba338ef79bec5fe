"""The port to resumable streams, for surfaces and the front. `router.resume.service` is the one behind it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from core.errors import ServingError
from router.resume.events import LoggedEvent, StreamKey, StreamKind

Batches = AsyncGenerator[Sequence[bytes], None]
"""The events of a call as they come; raises the ServingError that it fails with."""


class Follower(Protocol):
    """A reader of a stream."""

    async def take(self) -> list[LoggedEvent]:
        """Wait for events, return some; none: that was the end.

        Raises:
            ServingError: how the stream failed, or why it cannot be read here; everything before it was taken.
        """
        ...

    def close(self) -> None:
        """It reads no more. Idempotent; to be called in any case."""
        ...


class StreamKeeper(Protocol):
    """Keeps the streams of calls that ask for it beyond their connections.

    Concurrency: the event loop's thread.
    """

    def window(self, asked_s: float | None) -> float:
        """Return the window that a call gets; 0: it is not resumable.

        Raises:
            InvalidRequest: no such window is served.
            RejectedError: QUEUE_FULL, no further stream can be kept.
        """
        ...

    def open(
        self,
        key: StreamKey,
        kind: StreamKind,
        window_s: float,
        batches: Batches,
        abort: Callable[[ServingError], None],
    ) -> Follower:
        """Keep the stream of a call that was taken in. Returns its first reader.

        Args:
            abort: fails the call; `batches` then raises this error.
        """
        ...

    async def follow(self, key: StreamKey, after: int | None) -> tuple[StreamKind, Follower]:
        """Read a stream on, wherever it is, behind event `after`; None: from its beginning.

        Raises:
            RequestNotFound: there is none, or not of this tenant, or its window has passed.
            EventsGone, InvalidRequest: it cannot be continued there.
            StoreUnavailable: it is none of this gateway's, and whether it is another's cannot be told.
            RejectedError: QUEUE_FULL, no room for one more of another gateway.
        """
        ...
