"""Frames in the order in which they will be sent, the first few of them being encoded already.

The sender thread cuts parts into frames and puts them here; coded ones become jobs of the codec threads as soon as the
look-ahead has room, and are taken out in order whoever is ready first. Frames of transfers that have ended drop out.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from kv_transfer.box import Box
from kv_transfer.codec_threads import Buffers, CodecThreads
from kv_transfer.sender.encoding import EncodeJob, FrameEncoder
from kv_transfer.sender.outgoing import Commit, Outgoing


@dataclass(slots=True, eq=False)
class LineItem:
    """A frame, or the commit behind the last one. `job` is None for raw frames and for what is not begun."""

    outgoing: Outgoing
    what: Box | Commit
    job: EncodeJob | None = None

    @property
    def is_coded(self) -> bool:
        return isinstance(self.what, Box) and not self.outgoing.encoder.is_identity

    @property
    def is_ready(self) -> bool:
        return not self.is_coded or (self.job is not None and self.job.is_done)

    def discard(self) -> None:
        if self.job is not None:
            self.job.discard()


class SendLine:
    """The line of one pair. Sender thread only."""

    def __init__(
        self,
        encoder: FrameEncoder,
        threads: CodecThreads,
        buffers: Buffers,
        on_done: Callable[[], None],
        *,
        max_raw_bytes: int,
    ) -> None:
        """
        Args:
            on_done: told on a codec thread when a frame was encoded.
            max_raw_bytes: KV that is being encoded or waits encoded; one frame is always begun.
        """
        self._encoder = encoder
        self._threads = threads
        self._buffers = buffers
        self._on_done = on_done
        self._max_frames = threads.num_threads + 2  # one is being sent, one waits so that the wire never does
        self._max_raw_bytes = max_raw_bytes
        self._items: deque[LineItem] = deque()

    def __bool__(self) -> bool:
        return bool(self._items)

    @property
    def head(self) -> LineItem | None:
        return self._items[0] if self._items else None

    @property
    def has_room(self) -> bool:
        """Everything here has been begun, and one more coded frame could be."""
        return all(not item.is_coded or item.job is not None for item in self._items) and self._may_begin()

    def append(self, outgoing: Outgoing, whats: Iterable[Box | Commit]) -> None:
        self._items.extend(LineItem(outgoing, what) for what in whats)

    def put_back(self, item: LineItem) -> None:
        """Make an item that was popped the head again."""
        self._items.appendleft(item)

    def pop(self) -> LineItem:
        """Take the head; its job is the caller's to discard."""
        return self._items.popleft()

    def drop_ended(self) -> None:
        self._drop(lambda item: item.outgoing.gate.is_closed)

    def drop(self, transfers: Container[int]) -> None:
        """Drop what belongs to transfers of these `id()`s."""
        self._drop(lambda item: id(item.outgoing) in transfers)

    def clear(self) -> None:
        self._drop(lambda item: True)

    def transfers(self) -> list[Outgoing]:
        return [item.outgoing for item in self._items]

    def begin(self) -> None:
        """Begin to encode as many frames as the look-ahead allows, in order."""
        for item in self._items:
            if not item.is_coded or item.job is not None:
                continue
            if not self._may_begin():
                return
            assert isinstance(item.what, Box)
            item.job = EncodeJob(self._encoder, item.outgoing, item.what, self._buffers, self._on_done)
            self._threads.submit(item.job.run)

    def _may_begin(self) -> bool:
        begun = [item.job for item in self._items if item.job is not None]
        if not begun:
            return True
        return len(begun) < self._max_frames and sum(job.raw_bytes for job in begun) < self._max_raw_bytes

    def _drop(self, is_void: Callable[[LineItem], bool]) -> None:
        if not any(is_void(item) for item in self._items):
            return
        kept = [item for item in self._items if not is_void(item)]
        for item in self._items:
            if is_void(item):
                item.discard()
        self._items = deque(kept)
