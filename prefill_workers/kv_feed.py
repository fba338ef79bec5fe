"""What of one prompt is ready to be sent, on its way to the sender: kept until the sender knows whereto.

The engine's thread says which KV is in the pool, the event loop what the first token was, and that the transfer was
offered. What was said before the offer is passed on right after it, in the same order; nothing is copied here.
"""

import threading
from typing import Protocol

from core.ids import RequestId, TransferId


class Sender(Protocol):
    """What `kv_transfer.sender.KvSender` does with it. Any thread; never blocks."""

    def push(self, transfer_id: TransferId, layers: range, tokens: range) -> None: ...

    def commit(self, transfer_id: TransferId, first_token_id: int) -> None: ...


class KvFeed:
    """Of one request. A `PrefillObserver` for the engine. All methods: any thread."""

    def __init__(self, sender: Sender, transfer_id: TransferId) -> None:
        self._sender = sender
        self._transfer_id = transfer_id
        self._lock = threading.Lock()  # held while passing on, so that nothing overtakes what was kept
        self._is_open = False
        self._kept: list[tuple[range, range]] = []
        self._first_token_id: int | None = None

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        """These layers of these positions can be read."""
        with self._lock:
            if self._is_open:
                self._sender.push(self._transfer_id, layers, tokens)
            else:
                self._kept.append((layers, tokens))
                _join_last(self._kept)

    def commit(self, first_token_id: int) -> None:
        """All of the prompt was said to be ready."""
        with self._lock:
            if self._is_open:
                self._sender.commit(self._transfer_id, first_token_id)
            else:
                self._first_token_id = first_token_id

    def open(self) -> None:
        """The transfer was offered: pass on what was kept, and from now on everything at once."""
        with self._lock:
            self._is_open = True
            for layers, tokens in self._kept:
                self._sender.push(self._transfer_id, layers, tokens)
            self._kept.clear()
            if self._first_token_id is not None:
                self._sender.commit(self._transfer_id, self._first_token_id)


def _join_last(parts: list[tuple[range, range]]) -> None:
    """Make one part of the last two as long as they are one box: however long the prompt, a few parts are kept."""
    while len(parts) > 1:
        (layers, tokens), (next_layers, next_tokens) = parts[-2:]
        if tokens == next_tokens and layers.stop == next_layers.start:
            joined = range(layers.start, next_layers.stop), tokens
        elif layers == next_layers and tokens.stop == next_tokens.start:
            joined = layers, range(tokens.start, next_tokens.stop)
        else:
            return
        parts[-2:] = [joined]
