"""What one request waits for, and until when: its end, a worker's answer, the next look for a decode worker. Pure."""

from router import messages as m
from router.lifecycle import ASKING, RequestState

S = RequestState
_LOOKING = frozenset({S.SEEKING, S.HOLDING})
_UNPLACED = frozenset({S.HOLDING, S.PLACING})


class Patience:
    """The deadlines of one request, moved with its state.

    Attributes:
        deadline_at: of the whole request.
        answer_due_at: when whoever was asked must have answered; set in the asking states.
        seek_at: when to look for a decode worker again, if one is looked for.
        hold_until: how long the KV may wait for a decode worker after the first token.
    """

    def __init__(self, *, deadline_at: float, accept_timeout_s: float, hold_timeout_s: float) -> None:
        self.deadline_at = deadline_at
        self.accept_timeout_s = accept_timeout_s
        self._hold_timeout_s = hold_timeout_s
        self.answer_due_at: float | None = None
        self.seek_at: float | None = None
        self.hold_until: float | None = None

    def next_deadline(self) -> float:
        """Return the first of them."""
        first = self.deadline_at
        if self.answer_due_at is not None:
            return min(first, self.answer_due_at)  # holding on may have been long enough: the answer comes first
        for other in (self.seek_at, self.hold_until):
            if other is not None and other < first:
                first = other
        return first

    def moved(self, before: RequestState, state: RequestState, event: m.Event, now: float) -> None:
        """`event` led from `before` to `state`."""
        if state not in ASKING:
            self.answer_due_at = None
        elif self.answer_due_at is None or (state is not before and (before, state) != (S.BINDING, S.PLACING)):
            self.answer_due_at = now + self.accept_timeout_s
        if isinstance(event, m.DecodeUnavailable):
            self.seek_at = now + event.wait_s
        elif state not in _LOOKING or isinstance(event, m.SeekDue):
            self.seek_at = None
        if state not in _UNPLACED:
            self.hold_until = None
        elif self.hold_until is None:
            self.hold_until = now + self._hold_timeout_s

    def check(self, state: RequestState) -> None:
        """Assert what must hold between events."""
        assert (self.answer_due_at is not None) is (state in ASKING)
        assert (self.hold_until is not None) is (state in _UNPLACED)
        assert self.seek_at is None or state in _LOOKING
