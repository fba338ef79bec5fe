"""The port to the workers: orders go in by `WorkerPort`, what the workers say comes back through `WorkerListener`.

The gateway's own implementation is `router.workers.WorkerPool` (gRPC streams); a simulator has another. Whoever
implements it must keep the order of what one worker says, and must not call the listener from within a call of the
port: an order is answered later, or never.
"""

from dataclasses import dataclass
from typing import Protocol

from core.errors import ServingError
from core.ids import Epoch, TransferId, WorkerId
from core.membership import LoadReport, WorkerRecord
from core.request import GenerateRequest
from router.messages import WorkEvents


@dataclass(frozen=True, slots=True)
class PrefillOrder:
    """A prompt for a prefill worker.

    Attributes:
        work_id: names the work on the wire, and its transfer.
        block_hashes: of the prompt, as this worker's cache is keyed.
        decode: where the KV goes; None: not known yet (`bind_later`), or nowhere (this worker generates all of it).
        cached_tokens: of the prompt, that the worker should have in its prefix cache.
        bind_later: the decode worker follows by `WorkerPort.bind`.
        max_queued_tokens: refuse as busier when more prompt tokens than this wait there already; None: never.
    """

    work_id: TransferId
    request: GenerateRequest
    block_hashes: tuple[bytes, ...]
    decode: WorkerRecord | None = None
    cached_tokens: int = 0
    bind_later: bool = False
    max_queued_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeOrder:
    """A reservation at a decode worker, or a whole request for it.

    Attributes:
        generate: no KV will come: this worker computes the prompt, too, and streams from the first token on.
        max_queued_tokens: as for a prompt.
        max_requests_held: refuse as busier when more requests than this are held there already; None: never.
    """

    work_id: TransferId
    request: GenerateRequest
    block_hashes: tuple[bytes, ...]
    generate: bool = False
    max_queued_tokens: int | None = None
    max_requests_held: int | None = None


class WorkerPort(Protocol):
    """Sends to workers. Nothing here waits, and nothing is kept for a worker that is not connected."""

    def submit_prefill(self, worker_id: WorkerId, order: PrefillOrder) -> bool:
        """Returns False when the worker is not connected."""
        ...

    def submit_decode(self, worker_id: WorkerId, order: DecodeOrder) -> bool:
        """Returns False when the worker is not connected."""
        ...

    def bind(self, worker_id: WorkerId, work_id: TransferId, decode: WorkerRecord | None) -> bool:
        """Tell a prefill worker where the KV of a prompt goes that it was given with `bind_later`.

        Args:
            decode: has accepted; None: nobody will, the prefill worker generates the rest itself.

        Returns:
            False when the worker is not connected.
        """
        ...

    def abort(self, worker_id: WorkerId, work_id: TransferId, reason: str) -> None:
        """Tell a worker to free a work. Nothing to do for one that is not connected: it has freed it."""
        ...

    def connected_epoch(self, worker_id: WorkerId) -> Epoch | None:
        """Return the incarnation that the live connection leads to; None without one."""
        ...


class WorkerListener(Protocol):
    """Who is told what comes from the workers. Called on the event loop, must not block."""

    def on_up(self, worker_id: WorkerId) -> None:
        """The connection to an incarnation lives: `connected_epoch` tells which."""
        ...

    def on_down(self, worker_id: WorkerId, error: ServingError) -> None:
        """The connection ended: the worker has freed, or will free, all that came over it."""
        ...

    def on_work_events(self, worker_id: WorkerId, events: WorkEvents) -> None: ...

    def on_load(self, worker_id: WorkerId, load: LoadReport) -> None: ...
