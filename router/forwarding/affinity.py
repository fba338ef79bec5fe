"""Which workers served a session last, so that its next request may go there when that costs nothing.

A preference, never a rule: the prefix cache, which the cost sees, is what makes a session's old worker cheap; the
binding decides between equals, and where no cache has told of itself yet. Bounded; forgets by time and by use.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from core.ids import WorkerId
from router.forwarding.config import AffinityConfig


@dataclass(frozen=True, slots=True)
class SessionBinding:
    """Workers of a session's last request; None: there was none of that role."""

    prefill: WorkerId | None
    decode: WorkerId | None
    expires_at: float


class SessionAffinity:
    """Bindings by session, least recently used first. The caller owns the time.

    Attributes:
        on_bound: told of every session that this gateway itself bound.
    """

    def __init__(self, config: AffinityConfig) -> None:
        self._config = config
        self._bindings: OrderedDict[str, SessionBinding] = OrderedDict()
        self.on_bound: Callable[[str], None] | None = None

    def __len__(self) -> int:
        return len(self._bindings)

    def bind(self, session_id: str, prefill: WorkerId | None, decode: WorkerId | None, now: float) -> None:
        """These workers serve the session now."""
        self._put(session_id, SessionBinding(prefill, decode, now + self._config.ttl_s))
        if self.on_bound is not None:
            self.on_bound(session_id)

    def adopt(
        self, session_id: str, prefill: WorkerId | None, decode: WorkerId | None, expires_in_s: float, now: float
    ) -> None:
        """Another gateway bound the session. A binding of later use is kept."""
        known = self._bindings.get(session_id)
        adopted = SessionBinding(prefill, decode, now + min(expires_in_s, self._config.ttl_s))
        if adopted.expires_at > now and (known is None or known.expires_at < adopted.expires_at):
            self._put(session_id, adopted)

    def of(self, session_id: str, now: float) -> SessionBinding | None:
        """Return who served the session last."""
        binding = self._bindings.get(session_id)
        if binding is not None and binding.expires_at <= now:
            del self._bindings[session_id]
            return None
        return binding

    def items(self, now: float) -> Iterator[tuple[str, SessionBinding]]:
        """Yield the sessions that live, the last used first."""
        for session_id, binding in reversed(self._bindings.items()):
            if binding.expires_at > now:
                yield session_id, binding

    def _put(self, session_id: str, binding: SessionBinding) -> None:
        self._bindings[session_id] = binding
        self._bindings.move_to_end(session_id)
        if len(self._bindings) > self._config.max_sessions:
            self._bindings.popitem(last=False)
