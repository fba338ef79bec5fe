"""Peers for the KV transfer tests: pools that are plain arrays, owners that remember, control streams to look into."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from core.clock import ManualClock, MonotonicClock
from core.errors import RejectedError, RejectReason
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer.carriers.memory_control import MemoryStream
from kv_transfer.carriers.memory_links import MemoryHub, MemoryLinks
from kv_transfer.choice import ProfileChooser
from kv_transfer.codec import TORCH_DTYPES, Decoder
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import FRAME_VERSION
from kv_transfer.link import Links
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import LandedStats, Peer
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.sender.sender import KvSender
from protos import kv_transfer_pb2 as pb

LAYOUT = KvLayout("weights", num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32", block_size=4)
PATIENCE_S = 20.0  # a deadline, not a duration: only a hang uses it up


def hello_of(epoch: int = 3) -> pb.SenderMessage:
    """Return what the duo's sender says first, in its first incarnation or another."""
    return pb.SenderMessage(
        hello=pb.SenderHello(
            worker_id="prefill",
            epoch=epoch,
            receiver_epoch=7,
            layout_fingerprint=LAYOUT.fingerprint,
            frame_version=FRAME_VERSION,
        )
    )


class ArrayPool:
    """Reader and writer over one dense array per request; a block layout is the engine's business, not the wire's."""

    def __init__(self, layout: KvLayout = LAYOUT) -> None:
        self.layout = layout
        self.arrays: dict[RequestId, Tensor] = {}
        self.writes: list[tuple[RequestId, range, range]] = []
        self.num_inside = 0
        self.blocked_by: threading.Event | None = None  # accesses wait for it, as inside a slow copy
        self.is_entered = threading.Event()

    def fill(self, request_id: RequestId, num_tokens: int, seed: int = 0) -> Tensor:
        """Put random KV of [0, num_tokens) there."""
        generator = torch.Generator().manual_seed(seed)
        kv = torch.randn(self._shape(num_tokens), generator=generator).to(TORCH_DTYPES[self.layout.dtype])
        self.arrays[request_id] = kv
        return kv

    def clear(self, request_id: RequestId, num_tokens: int) -> Tensor:
        """Reserve [0, num_tokens); nothing written is NaN."""
        self.arrays[request_id] = torch.full(
            self._shape(num_tokens), float("nan"), dtype=TORCH_DTYPES[self.layout.dtype]
        )
        return self.arrays[request_id]

    def read_kv(
        self,
        request_id: RequestId,
        layers: range,
        tokens: range,
        out: Tensor | None = None,
        heads: range | None = None,
    ) -> Tensor:
        with self._inside():
            kv = self._box(request_id, layers, tokens, heads)
            return out.copy_(kv) if out is not None else kv.contiguous()

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: Tensor, heads: range | None = None
    ) -> None:
        with self._inside():
            self._box(request_id, layers, tokens, heads).copy_(kv)
            self.writes.append((request_id, layers, tokens))

    def _box(self, request_id: RequestId, layers: range, tokens: range, heads: range | None) -> Tensor:
        try:
            array = self.arrays[request_id]
        except KeyError:
            raise RejectedError(RejectReason.NO_BLOCKS, f"{request_id} has no blocks") from None
        heads = heads or range(self.layout.num_kv_heads)
        return array[layers.start : layers.stop, :, heads.start : heads.stop, tokens.start : tokens.stop]

    def _shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        return (self.layout.num_layers, 2, self.layout.num_kv_heads, num_tokens, self.layout.head_dim)

    def _inside(self) -> "_Inside":
        return _Inside(self)


class _Inside:
    def __init__(self, pool: ArrayPool) -> None:
        self._pool = pool

    def __enter__(self) -> None:
        self._pool.num_inside += 1
        self._pool.is_entered.set()
        if self._pool.blocked_by is not None:
            assert self._pool.blocked_by.wait(PATIENCE_S)

    def __exit__(self, *exc: object) -> None:
        self._pool.num_inside -= 1


@dataclass
class Outcomes:
    """Owner of either side: remembers every outcome and lets tests wait for one."""

    pool: ArrayPool
    told: dict[TransferId, list[tuple[str, str]]] = field(default_factory=dict)
    first_tokens: dict[TransferId, int] = field(default_factory=dict)
    stats: dict[TransferId, LandedStats] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_acked(self, transfer_id: TransferId) -> None:
        self._tell(transfer_id, "acked", "")

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        self.first_tokens[transfer_id] = first_token_id
        self.stats[transfer_id] = stats
        self._tell(transfer_id, "landed", "")

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        self._tell(transfer_id, reason, detail)

    def _tell(self, transfer_id: TransferId, outcome: str, detail: str) -> None:
        self.told.setdefault(transfer_id, []).append((outcome, detail))
        self._changed.set()

    async def outcome(self, transfer_id: TransferId) -> str:
        """Wait for the outcome of a transfer; there must be exactly one."""
        async with asyncio.timeout(PATIENCE_S):
            while transfer_id not in self.told:
                self._changed.clear()
                await self._changed.wait()
        assert len(self.told[transfer_id]) == 1, self.told[transfer_id]
        return self.told[transfer_id][0][0]


class WatchedDialer:
    """Control streams straight into one receiver of this process, kept to be looked at."""

    def __init__(self, receiver: KvReceiver) -> None:
        self.receiver = receiver
        self.streams: list[WatchedStream] = []

    def dial(self, peer: Peer) -> "WatchedStream":
        stream = WatchedStream(self.receiver)
        self.streams.append(stream)
        return stream


class WatchedStream(MemoryStream):
    """Remembers what was said on it, and lets tests wait for it."""

    def __init__(self, receiver: KvReceiver) -> None:
        super().__init__(receiver)
        self.sent: list[pb.SenderMessage] = []
        self.heard: list[pb.ReceiverMessage] = []
        self._changed = asyncio.Event()

    def send(self, message: pb.SenderMessage) -> None:
        self.sent.append(message)
        self._changed.set()
        super().send(message)

    async def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        async for message in super().messages():
            self.heard.append(message)
            self._changed.set()
            yield message

    async def until_heard(self, kind: str, count: int = 1) -> None:
        """Wait until the sender has heard `count` messages of a kind."""
        await self._until(lambda: sum(message.WhichOneof("message") == kind for message in self.heard) >= count)

    async def until_offered(self) -> None:
        """Wait until the sender has said an offer."""
        await self.until_said("offer")

    async def until_said(self, kind: str) -> None:
        """Wait until the sender has said a message of a kind."""
        await self._until(lambda: any(message.WhichOneof("message") == kind for message in self.sent))

    async def until_served(self) -> None:
        """Wait until the receiver has taken everything that was said."""
        await self._until(self.to_receiver.empty)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _inbound(self) -> AsyncIterator[pb.SenderMessage]:
        async for message in super()._inbound():
            self._changed.set()
            yield message


class Duo:
    """A sender and a receiver of one process, joined by memory links and memory streams."""

    def __init__(
        self,
        config: KvTransferConfig | None = None,
        *,
        clock: ManualClock | MonotonicClock | None = None,
        sender_layout: KvLayout = LAYOUT,
        receiver_layout: KvLayout = LAYOUT,
        links: tuple[Links, Links] | None = None,
        receiver_id: str = "decode",
        chooser: ProfileChooser | None = None,
        decoders: Mapping[int, Decoder] | None = None,
    ) -> None:
        self.config = config or KvTransferConfig(backend="memory", slot_bytes=4096, credit_bytes=16384)
        self.clock = clock or MonotonicClock()
        hub = MemoryHub()
        sender_links, receiver_links = links or (MemoryLinks(hub), MemoryLinks(hub))
        self.sender_metrics = KvTransferMetrics(CollectorRegistry())
        self.receiver_metrics = KvTransferMetrics(CollectorRegistry())
        self.source, self.target = ArrayPool(sender_layout), ArrayPool(receiver_layout)
        self.sent, self.landed = Outcomes(self.source), Outcomes(self.target)
        self.receiver = KvReceiver(
            self.config,
            WorkerIdentity(WorkerId(receiver_id), Epoch(7), "test"),
            receiver_layout,
            self.target,
            self.landed,
            self.clock,
            links=receiver_links,
            decoders=decoders,
            metrics=self.receiver_metrics,
        )
        self.dialer = WatchedDialer(self.receiver)
        self.sender = KvSender(
            self.config,
            WorkerIdentity(WorkerId("prefill"), Epoch(3), "test"),
            sender_layout,
            self.source,
            self.sent,
            self.clock,
            chooser=chooser,
            links=sender_links,
            dialer=self.dialer,
            metrics=self.sender_metrics,
        )
        self.peer = Peer(WorkerId(receiver_id), Epoch(7), "in memory")

    async def __aenter__(self) -> "Duo":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.sender.close()
        await self.receiver.close()
        for outcomes in (self.sent, self.landed):
            assert all(len(told) == 1 for told in outcomes.told.values()), outcomes.told
        for thread in threading.enumerate():
            if thread.name.startswith(("kv-send", "kv-receive", "kv-codec")):
                await asyncio.to_thread(thread.join, PATIENCE_S)
                assert not thread.is_alive(), thread.name

    async def begin(self, name: str, num_tokens: int, held_tokens: int = 0) -> tuple[TransferId, Tensor, Tensor]:
        """Fill the source, reserve in the target, expect and offer. Returns (transfer, source KV, target KV)."""
        transfer_id, request_id = TransferId(f"{name}/0"), RequestId(name)
        kv = self.source.fill(request_id, num_tokens)
        target = self.target.clear(request_id, num_tokens)
        await self.receiver.expect(transfer_id, request_id, held_tokens, num_tokens)
        await self.sender.offer(transfer_id, request_id, num_tokens, self.peer)
        return transfer_id, kv, target
