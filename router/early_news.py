"""News of a decode worker that comes before the first token: the streams of two workers have no common order.

It is checked when it comes, so that it cannot be refused when its turn comes, and kept until then. Pure.
"""

from core.errors import ProtocolError
from core.request import TokenOutput
from router import messages as m


def check_order(tokens: tuple[TokenOutput, ...], *, first: int) -> None:
    """Raises: ProtocolError, unless the tokens have the indices from `first` on."""
    for index, token in enumerate(tokens, first):
        if token.index != index:
            raise ProtocolError(f"expected token {index}, got token {token.index}")


class EarlyNews:
    """Of one attempt of one request."""

    def __init__(self) -> None:
        self._events: list[m.Event] = []
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._events)

    @property
    def has_tokens(self) -> bool:
        """There are tokens, which were checked to follow one token of the prefill worker."""
        return self._num_tokens > 0

    def keep(self, event: m.EarlyEvent) -> None:
        """Raises: ProtocolError, when it does not follow what was kept; nothing changed."""
        is_first = isinstance(event, m.KvLanded | m.TransferCancelled)
        if is_first is bool(self._events):
            raise ProtocolError("a decode worker's news must begin with the landing of the KV, and have it once")
        if isinstance(event, m.DecodeProduced | m.DecodeFinished):
            check_order(event.tokens, first=1 + self._num_tokens)
            self._num_tokens += len(event.tokens)
        self._events.append(event)

    def take(self) -> list[m.Event]:
        """Return what was kept, in order, and forget it."""
        kept, self._events = self._events, []
        self._num_tokens = 0
        return kept
