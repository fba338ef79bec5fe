"""A pair whose transfers are coded: its codec stops and fails on demand, its links tell what was sent."""

import asyncio
import threading

from core.ids import TransferId
from kv_transfer.carriers.memory_links import MemoryHub, MemoryLinks
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES, decode_header
from kv_transfer.link import LinkPlan, ReceiveEnd, SendEnd, Slot
from tests.kv_codecs import FixedChooser, FlippingDecoder, FlippingEncoder, decoders_with
from tests.kv_peers import LAYOUT, PATIENCE_S, Duo

LAYERS = range(LAYOUT.num_layers)
FRAME_TOKENS = 8  # of 384 bytes each: what fits into a slot
CONFIG = KvTransferConfig(
    backend="memory", slot_bytes=4096, credit_bytes=65536, num_slots=2, codec_threads=3, min_frame_raw_bytes=4096
)


class WatchedLinks:
    """Memory links that note which frame was sent when."""

    backend = "memory"

    def __init__(self, hub: MemoryHub) -> None:
        self._inner = MemoryLinks(hub)
        self.starts: list[int] = []
        self.num_sent = threading.Semaphore(0)
        self.ends: list[SendEnd] = []

    def host(self) -> str:
        return self._inner.host()

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        self.ends.append(self._inner.open_send(address, plan))
        return _WatchedEnd(self.ends[-1], self)

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        return self._inner.open_receive(plan)

    def close(self) -> None:
        self._inner.close()

    async def until_sent(self, count: int) -> None:
        for _ in range(count):
            assert await asyncio.to_thread(self.num_sent.acquire, timeout=PATIENCE_S)


class _WatchedEnd:
    carrier = "memory"

    def __init__(self, inner: SendEnd, links: WatchedLinks) -> None:
        self._inner = inner
        self._links = links
        self.acquire, self.flush, self.abort, self.close = inner.acquire, inner.flush, inner.abort, inner.close

    def send(self, slot: Slot, num_bytes: int) -> None:
        header = decode_header(slot.view()[:HEADER_BYTES], num_bytes - HEADER_BYTES)
        self._links.starts.append(header.box.tokens.start)
        self._inner.send(slot, num_bytes)
        self._links.num_sent.release()


class Coded:
    """A duo whose transfers all use one codec, and what can be seen of it."""

    def __init__(self, config: KvTransferConfig = CONFIG) -> None:
        self.encoder, self.decoder = FlippingEncoder(), FlippingDecoder()
        self.chooser = FixedChooser(self.encoder)
        hub = MemoryHub()
        self.links = WatchedLinks(hub)
        self.duo = Duo(
            config,
            links=(self.links, MemoryLinks(hub)),
            chooser=self.chooser,
            decoders=decoders_with(self.decoder),
        )

    def push(self, transfer_id: TransferId, num_tokens: int, *, commits: bool = True) -> None:
        self.duo.sender.push(transfer_id, LAYERS, range(num_tokens))
        if commits:
            self.duo.sender.commit(transfer_id, 1)

    async def settled(self, transfer_id: TransferId) -> tuple[str, str]:
        return await self.duo.sent.outcome(transfer_id), await self.duo.landed.outcome(transfer_id)

    def check_nothing_is_lent(self) -> None:
        """After both sides were closed."""
        assert self.duo.sender._parts.buffers.lent_bytes == 0
        assert self.duo.receiver._parts.buffers.lent_bytes == 0


async def is_set(event: threading.Event) -> None:
    """Wait for an event of another thread."""
    assert await asyncio.to_thread(event.wait, PATIENCE_S)
