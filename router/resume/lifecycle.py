"""The states of a resumable stream at the gateway that serves it, and every way between them, as one table.

1. FOLLOWED: the request runs, and somebody reads it here.
2. The last reader left, or its connection broke: ALONE; the request goes on. A reader that comes back within the
   window: FOLLOWED. Somebody who reads it at another gateway keeps it going as well.
3. The request is over, well or badly: TOLD while somebody still reads it here, else KEPT for the window.
4. The window lapsed: FORGOTTEN; what still runs is aborted. What is KEPT may have to make room before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from core.errors import InvalidTransition


class StreamState(StrEnum):
    FOLLOWED = "followed"
    ALONE = "alone"
    TOLD = "told"
    KEPT = "kept"
    FORGOTTEN = "forgotten"


@dataclass(frozen=True, slots=True)
class FollowerCame:
    """Somebody reads it here."""


@dataclass(frozen=True, slots=True)
class LastFollowerLeft:
    """Nobody reads it here any more."""


@dataclass(frozen=True, slots=True)
class ReadElsewhere:
    """Another gateway said, within the window, that somebody reads it there."""


@dataclass(frozen=True, slots=True)
class StoreSilent:
    """The window is over, and whether it is read elsewhere cannot be told."""


@dataclass(frozen=True, slots=True)
class WindowLapsed:
    """The window is over, and nobody read it in that time."""


@dataclass(frozen=True, slots=True)
class Overflowed:
    """It has more unread events than may be kept."""

    cause: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The request is over."""


@dataclass(frozen=True, slots=True)
class RoomNeeded:
    """Its events are to make room for others'."""


Event = FollowerCame | LastFollowerLeft | ReadElsewhere | StoreSilent | WindowLapsed | Overflowed | Ended | RoomNeeded


@dataclass(frozen=True, slots=True)
class AbortUnread:
    """End the request: nobody reads it."""

    cause: str


@dataclass(frozen=True, slots=True)
class AbortOverflowed:
    """End the request: its reader does not keep up."""

    cause: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the events, here and in the store."""

    cause: str


Effect = AbortUnread | AbortOverflowed | Forget
S = StreamState
ALL_EVENTS: tuple[type[Event], ...] = Event.__args__

EDGES: Mapping[StreamState, Mapping[type[Event], StreamState]] = {
    S.FOLLOWED: {
        FollowerCame: S.FOLLOWED,  # several may read at a time
        LastFollowerLeft: S.ALONE,
        Overflowed: S.FOLLOWED,  # its end will be told
        Ended: S.TOLD,
    },
    S.ALONE: {
        FollowerCame: S.FOLLOWED,
        ReadElsewhere: S.ALONE,  # the window begins anew
        StoreSilent: S.ALONE,  # once: the store may come back, with news of a reader
        WindowLapsed: S.FORGOTTEN,
        Overflowed: S.ALONE,
        Ended: S.KEPT,
    },
    S.TOLD: {
        FollowerCame: S.TOLD,
        LastFollowerLeft: S.KEPT,
    },
    S.KEPT: {
        FollowerCame: S.TOLD,
        WindowLapsed: S.FORGOTTEN,
        RoomNeeded: S.FORGOTTEN,
    },
    S.FORGOTTEN: {},
}


class StreamLife:
    """One stream's machine. Begins with a reader: the client whose call it is.

    Args:
        window_s: for so long it goes on, or is kept, without a reader.
    """

    def __init__(self, window_s: float) -> None:
        self.state = S.FOLLOWED
        self._window_s = window_s
        self._deadline: float | None = None
        self._is_in_grace = False

    def next_deadline(self) -> float | None:
        """When the window is over; None: none runs."""
        return self._deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Walk an edge.

        Raises:
            InvalidTransition: there is none; nothing changed.
        """
        target = EDGES[self.state].get(type(event))
        if target is None:
            raise InvalidTransition("resumable stream", self.state, event)
        effects: list[Effect] = []
        match event:
            case WindowLapsed():
                cause = f"nobody read it for {self._window_s:g} s"
                effects = [AbortUnread(cause), Forget("lapsed")] if self.state is S.ALONE else [Forget("lapsed")]
            case StoreSilent() if self._is_in_grace:
                cause = f"nobody read it here for {2 * self._window_s:g} s, and the store is away"
                effects, target = [AbortUnread(cause), Forget("lapsed")], S.FORGOTTEN
            case Overflowed(cause):
                effects = [AbortOverflowed(cause)]
            case RoomNeeded():
                effects = [Forget("made room")]
        self._is_in_grace = isinstance(event, StoreSilent) and target is S.ALONE
        self._set_deadline(event, target, now)
        self.state = target
        return effects

    def _set_deadline(self, event: Event, target: StreamState, now: float) -> None:
        if target in (S.ALONE, S.KEPT):
            if not isinstance(event, Overflowed):  # no news of any reader
                self._deadline = now + self._window_s
        else:
            self._deadline = None

    def check(self) -> None:
        """Assert the invariants."""
        assert (self._deadline is not None) == (self.state in (S.ALONE, S.KEPT))
        assert not self._is_in_grace or self.state is S.ALONE
