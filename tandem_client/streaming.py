"""One streamed call from its beginning to its end, over as many attempts as that takes.

- Before the first event: what was refused for now is tried again, after the time that the gateway asks for.
- After it nothing is ever begun anew. A resumable call whose connection is lost is read on from the event after the
  last that came, at any gateway, for as long as its window lasts; anything else is the end.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc

from core.errors import (
    Aborted,
    DeadlineExceeded,
    RejectedError,
    RequestNotFound,
    ServingError,
    StoreUnavailable,
    WorkerLost,
)
from tandem_client.statuses import error_of, is_told

_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
_LOSSES = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
)


class Event(Protocol):
    """A numbered message of a stream."""

    @property
    def event_index(self) -> int: ...


E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a call that was refused for now is tried again, and who is told why and for how long it waits."""

    max_retries: int
    on_retry: Callable[[ServingError, float], None]


@dataclass(frozen=True, slots=True)
class Resumption(Generic[E]):
    """How a resumable call goes on.

    Attributes:
        resume: reads on from the event after one (None: from the beginning), with the seconds that are left.
        event_of: takes an event out of a message of such a call.
        abort: ends it.
    """

    window_s: float
    resume: Callable[[int | None, float | None], AsyncIterable[Any]]
    event_of: Callable[[Any], E]
    abort: Callable[[], Awaitable[object]]


class _Lost(WorkerLost):
    """The connection to the gateway broke, or there is none: it said nothing."""


_UNSURE = (_Lost, StoreUnavailable)  # whether the call lives cannot be told here; another gateway may know


class Attempts(Generic[E]):
    """The events of one call.

    Args:
        begin: makes the call, with the seconds that are left for it.
        deadline_s: for all attempts together; None: the gateway's default for each.

    Concurrency: one reader, once.
    """

    def __init__(
        self,
        begin: Callable[[float | None], AsyncIterable[E]],
        retries: Retries,
        *,
        deadline_s: float | None,
        resumption: Resumption[E] | None,
    ) -> None:
        self._begin = begin
        self._retries = retries
        self._deadline_s = deadline_s
        self._resumption = resumption
        self._loop = asyncio.get_running_loop()
        self._ends_at = None if deadline_s is None else self._loop.time() + deadline_s
        self._last: int | None = None
        self._lost_at: float | None = None
        self._num_waits = 0
        self._is_resuming = False

    async def events(self) -> AsyncGenerator[E, None]:
        """Raises: ServingError, of the kind that the gateway reported."""
        call: Any = self._begin(self._left_s())
        while True:
            try:
                async for message in call:
                    event = self._event(message)
                    if self._is_next(event):
                        yield event
                return
            except grpc.aio.AioRpcError as failed:
                error = self._error(failed)
                wait_s = self._wait_s(error)
                if wait_s is None:
                    raise error from failed
            except (asyncio.CancelledError, GeneratorExit) as left:
                if isinstance(left, asyncio.CancelledError) and call.cancelled() and not _is_being_cancelled():
                    raise Aborted("the call was cancelled") from left
                await self._leave()
                raise
            finally:
                call.cancel()
            self._retries.on_retry(error, wait_s)
            await asyncio.sleep(wait_s)
            call = self._next_call(error)

    def _event(self, message: Any) -> E:
        if self._resumption is not None and self._is_resuming:
            return self._resumption.event_of(message)
        event: E = message
        return event

    def _left_s(self) -> float | None:
        return None if self._ends_at is None else max(0.0, self._ends_at - self._loop.time())

    def _is_next(self, event: E) -> bool:
        """Note an event. Raises: ServingError, when one before it is missing."""
        index = event.event_index
        expected = 0 if self._last is None else self._last + 1
        if index > expected:
            raise ServingError(f"the gateway left out event {expected} and sent {index}")
        self._lost_at = None
        self._num_waits = 0
        if index < expected:
            return False
        self._last = index
        return True

    def _error(self, failed: grpc.aio.AioRpcError) -> ServingError:
        if failed.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"no end within {self._deadline_s} s")
        if failed.code() in _LOSSES and not is_told(failed):
            return _Lost(failed.details() or failed.code().name)
        return error_of(failed)

    def _wait_s(self, error: ServingError) -> float | None:
        """Return after how long to go on; None: not at all."""
        self._num_waits += 1
        if self._last is not None:
            if not self._may_be_read_on(error):
                return None
        elif not (error.retryable or self._is_unknown(error)) or self._num_waits > self._retries.max_retries:
            return None
        wait_s = min(_BACKOFF_S * 2 ** (self._num_waits - 1), _MAX_BACKOFF_S)
        if isinstance(error, RejectedError):
            wait_s = max(wait_s, error.retry_after_s)
        wait_s *= random.uniform(1.0, 1.5)
        return None if self._ends_at is not None and self._loop.time() + wait_s >= self._ends_at else wait_s

    def _may_be_read_on(self, error: ServingError) -> bool:
        """A gateway may still have what comes after the last event, as far as this side can tell."""
        if self._resumption is None or not isinstance(error, _UNSURE):
            return False
        now = self._loop.time()
        if self._lost_at is None:
            self._lost_at = now
        return now - self._lost_at < self._resumption.window_s

    def _is_unknown(self, error: ServingError) -> bool:
        """The call got lost on its way: no gateway has it."""
        return self._is_resuming and isinstance(error, RequestNotFound)

    def _next_call(self, error: ServingError) -> AsyncIterable[Any]:
        """A resumable call that was lost may have begun: to send it again would meet its own id."""
        self._is_resuming = self._resumption is not None and (self._last is not None or isinstance(error, _UNSURE))
        if self._resumption is not None and self._is_resuming:
            return self._resumption.resume(self._last, self._left_s())
        return self._begin(self._left_s())

    async def _leave(self) -> None:
        """The reader goes: without a word a resumable call would go on."""
        if self._resumption is not None:
            with contextlib.suppress(ServingError):  # then it ends with its window
                await self._resumption.abort()


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
