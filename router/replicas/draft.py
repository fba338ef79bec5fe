"""The next message to the other gateways, as it collects: what changed is named here and read when the message is
composed, so a hundred changes of one worker's credit are one entry. Bounded by what there is to tell of; of sessions,
the latest changes are kept while nobody can be told, and whole messages bring the others in their turn."""

from core.ids import GatewayId, WorkerId
from router.replicas.aborts import AbortRounds
from router.replicas.news import News
from router.replicas.shared_state import SharedState

_MAX_SESSIONS = 4096  # that changed and were not told of yet


class Draft:
    """Of one gateway. Pure but for reading the state."""

    def __init__(
        self, gateway_id: GatewayId, state: SharedState, aborts: AbortRounds, *, bindings_per_message: int
    ) -> None:
        self._gateway_id = gateway_id
        self._state = state
        self._aborts = aborts
        self._bindings_per_message = bindings_per_message
        self._sequence = 0
        self._credits: set[WorkerId] = set()
        self._sessions: dict[str, None] = {}  # in the order in which they changed
        self._breakers: set[WorkerId] = set()
        self._round: list[str] = []  # sessions that whole messages still have to bring in this round

    @property
    def is_empty(self) -> bool:
        return self._aborts.is_empty and not (self._credits or self._sessions or self._breakers)

    @property
    def num_sessions(self) -> int:
        """Sessions that changed and were not told of yet."""
        return len(self._sessions)

    def note_credit(self, worker_id: WorkerId) -> None:
        self._credits.add(worker_id)

    def note_session(self, session_id: str) -> None:
        self._sessions[session_id] = None
        if len(self._sessions) > _MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]

    def note_breaker(self, worker_id: WorkerId) -> None:
        self._breakers.add(worker_id)

    def compose(self, *, is_whole: bool) -> News:
        """Return the message and begin the next one. A whole message repeats everything, and goes round the sessions
        a slice at a time, so that whoever starts learns of all of them, and one that was lost is told of again."""
        state, self._sequence = self._state, self._sequence + 1
        workers = self._credits | set(state.credited()) if is_whole else self._credits
        suspects = self._breakers | set(state.suspected()) if is_whole else self._breakers
        names = list(self._sessions)[: self._bindings_per_message]
        changed = set(names)
        if is_whole:
            names += [name for name in self._slice(self._bindings_per_message - len(names)) if name not in changed]
        bindings = (state.binding(name) for name in names)
        news = News(
            self._gateway_id,
            self._sequence,
            is_whole,
            credits=tuple(state.credit(worker_id) for worker_id in sorted(workers)),
            bindings=tuple(one for one in bindings if one is not None),
            breakers=tuple(state.breaker(worker_id) for worker_id in sorted(suspects)),
            aborts_asked=self._aborts.asks(),
            aborts_answered=self._aborts.answers(),
        )
        self._credits = set()
        self._breakers = set()
        for name in changed:
            del self._sessions[name]
        return news

    def farewell(self) -> News:
        """Return the last message."""
        self._sequence += 1
        return News(self._gateway_id, self._sequence, is_leaving=True)

    def _slice(self, count: int) -> list[str]:
        if not self._round:
            self._round = list(reversed(self._state.sessions()))  # popped from its end
        return [self._round.pop() for _ in range(min(count, len(self._round)))]
