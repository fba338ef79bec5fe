"""The gateway's waiting room: bounded in requests and prompt tokens, first in first out, a slow start after refusals.

A ticket counts from `enter` until both workers accepted (or the request ended), so the bound holds for everything
that the cluster has not taken yet. Life of a ticket:
1. WAITING. While nobody has been refused, every `take` releases all who wait, in order of arrival.
2. RELEASED: being placed. Accepted: `leave`, and the gate opens, since a worker has room.
3. Refused by everybody: `put_back`, in its old place. The gate closes for a while that doubles with every such refusal
   in a row, with jitter, and a window limits how many may be released and unanswered at once from then on: 1 after a
   refusal, one more for each acceptance (so it doubles from round to round), no limit again once the queue was empty.
   Each time the gate closes the workers were thus asked at most 2k + 1 times for k acceptances, however many wait.
4. Who was released before the gate closed and is still without an answer takes no place in the window, and its refusal
   tells nothing new; its acceptance opens the gate as any other.

Pure but for the given generator; the caller owns the time.
"""

import random
from bisect import insort
from dataclasses import dataclass

from core.errors import RejectedError, RejectReason
from core.ids import RequestId

_RETRY_HINT_S = 1.0


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """A place in the queue; compares by arrival."""

    number: int
    request_id: RequestId
    num_tokens: int


class AdmissionQueue:
    """The queue.

    Args:
        retry_min_s, retry_max_s: bounds of the gate's closed time, before a worker's own hint.
    """

    def __init__(
        self, *, max_requests: int, max_tokens: int, retry_min_s: float, retry_max_s: float, rng: random.Random
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._retry_min_s = retry_min_s
        self._retry_max_s = retry_max_s
        self._rng = rng
        self._tickets: dict[RequestId, Ticket] = {}
        self._waiting: list[Ticket] = []
        self._num_tokens = 0
        self._next_number = 0
        self._window: int | None = None  # None: no limit
        self._asking: set[Ticket] = set()  # released within the window, without an answer yet
        self._closed_until: float | None = None  # None: the gate is open
        self._num_refusals = 0

    def __len__(self) -> int:
        """Requests that no pair of workers has accepted yet."""
        return len(self._tickets)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def check_room(self, num_tokens: int) -> None:
        """Raises: RejectedError, QUEUE_FULL. A prompt longer than the token bound fits an empty queue."""
        too_many = len(self._tickets) >= self._max_requests
        if too_many or (self._tickets and self._num_tokens + num_tokens > self._max_tokens):
            bound = f"{self._max_requests} requests" if too_many else f"{self._max_tokens} tokens"
            raise RejectedError(RejectReason.QUEUE_FULL, f"the gateway's queue of {bound} is full", _RETRY_HINT_S)

    def enter(self, request_id: RequestId, num_tokens: int) -> None:
        """Take a place.

        Raises:
            RejectedError: as `check_room`; nothing changed.
        """
        self.check_room(num_tokens)
        ticket = Ticket(self._next_number, request_id, num_tokens)
        self._next_number += 1
        self._num_tokens += num_tokens
        self._tickets[request_id] = ticket
        self._waiting.append(ticket)

    def take(self, now: float) -> list[RequestId]:
        """Release those whose turn it is, in order."""
        if self._closed_until is not None and now < self._closed_until:
            return []
        room = len(self._waiting) if self._window is None else max(0, self._window - len(self._asking))
        released, self._waiting = self._waiting[:room], self._waiting[room:]
        if self._window is not None:
            self._asking.update(released)
        return [ticket.request_id for ticket in released]

    def put_back(self, request_id: RequestId, num_tokens: int, now: float, retry_after_s: float = 0.0) -> None:
        """Everybody refused `request_id`. Also takes back one that had left (it lost its workers), full or not."""
        ticket = self._tickets.get(request_id)
        if ticket is None:
            ticket = self._tickets[request_id] = Ticket(-1, request_id, num_tokens)
            self._num_tokens += num_tokens
        insort(self._waiting, ticket)
        if self._window is not None and ticket not in self._asking:
            return  # released before the gate closed: it tells nothing new
        self._window = 1
        self._asking.clear()
        backoff_s = min(self._retry_max_s, self._retry_min_s * 2.0**self._num_refusals)
        wait_s = max(backoff_s * self._rng.uniform(0.5, 1.0), min(retry_after_s, self._retry_max_s))
        self._num_refusals = min(self._num_refusals + 1, 32)
        self._closed_until = now + wait_s

    def leave(self, request_id: RequestId, *, accepted: bool) -> None:
        """Both workers accepted it, or it ended. Idempotent."""
        ticket = self._tickets.pop(request_id, None)
        if accepted:
            self._closed_until = None
            self._num_refusals = 0
            if self._window is not None:
                self._window = self._window + 1 if self._tickets else None
        if ticket is None:
            return
        self._num_tokens -= ticket.num_tokens
        if ticket in self._asking:
            self._asking.remove(ticket)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)

    def note_capacity(self, now: float) -> None:
        """Something was freed, or a worker joined: the next question may go as early as the shortest wait allows."""
        if self._closed_until is not None:
            self._closed_until = min(self._closed_until, now + self._retry_min_s)
            self._num_refusals = 0

    def next_deadline(self) -> float | None:
        """When `take` has something to release that it has not now; None when nothing waits on time."""
        if self._closed_until is None or self._asking or not self._waiting:
            return None
        return self._closed_until
