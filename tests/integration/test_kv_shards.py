"""Tensor-parallel ranks on either side, over real paged pools of different block sizes: the bits are equal."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from core.clock import MonotonicClock
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from engine.pool import KvPool
from kv_transfer.carriers.memory_control import MemoryStream
from kv_transfer.carriers.memory_links import MemoryHub, MemoryLinks
from kv_transfer.codec import RAW, Encoder
from kv_transfer.config import KvTransferConfig
from kv_transfer.control import ControlStream
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import LandedStats, Peer
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.sender.sender import KvSender
from kv_transfer.shards import ShardsFailed, ShardsLanded, ShardTally, common_heads, shard_heads, shard_id
from tests.kv_codecs import FixedChooser, FlippingDecoder, FlippingEncoder, decoders_with
from tests.kv_peers import PATIENCE_S

MODEL = KvLayout("weights", num_layers=3, num_kv_heads=4, head_dim=8, dtype="bfloat16", block_size=4)
CONFIG = KvTransferConfig(backend="memory", slot_bytes=4096, credit_bytes=16384, min_frame_raw_bytes=4096)
REQUEST, TRANSFER = RequestId("r"), TransferId("r/0")
NUM_TOKENS, HELD_TOKENS = 45, 7


class RankPool:
    """The paged pool of one rank, which has some heads, behind a shuffled block table."""

    def __init__(self, heads: range, block_size: int, seed: int) -> None:
        self.layout = dataclasses.replace(MODEL, block_size=block_size)  # what the wire agrees on: the model's heads
        self._heads = heads
        num_blocks = -(-NUM_TOKENS // block_size)
        self._pool = KvPool(dataclasses.replace(self.layout, num_kv_heads=len(heads)), num_blocks)
        self._pool.kv.fill_(float("nan"))
        self._table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))

    def read_kv(
        self,
        request_id: RequestId,
        layers: range,
        tokens: range,
        out: Tensor | None = None,
        heads: range | None = None,
    ) -> Tensor:
        return self._pool.read(self._table, layers, tokens, out, self._local(heads))

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: Tensor, heads: range | None = None
    ) -> None:
        self._pool.write(self._table, layers, tokens, kv, self._local(heads))

    def fill(self, kv: Tensor) -> None:
        """Put this rank's heads of [layers, 2, K, T, D] there."""
        mine = kv[:, :, self._heads.start : self._heads.stop].contiguous()
        self._pool.write(self._table, range(MODEL.num_layers), range(NUM_TOKENS), mine)

    def whole(self) -> Tensor:
        return self._pool.read(self._table, range(MODEL.num_layers), range(NUM_TOKENS))

    def _local(self, heads: range | None) -> range:
        heads = heads or range(MODEL.num_kv_heads)
        assert heads.start >= self._heads.start
        assert heads.stop <= self._heads.stop
        return range(heads.start - self._heads.start, heads.stop - self._heads.start)


class RankOutcomes:
    """Owner of all ranks of one side: counts shards in."""

    def __init__(self, shards: list[TransferId]) -> None:
        self.tally = ShardTally(shards)
        self.acked: set[TransferId] = set()
        self.changed = asyncio.Event()

    def on_acked(self, transfer_id: TransferId) -> None:
        self.acked.add(transfer_id)
        self.changed.set()

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        self.tally.landed(transfer_id, first_token_id, stats)
        self.changed.set()

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        self.tally.failed(transfer_id, reason, detail)
        self.changed.set()

    async def verdict(self) -> ShardsLanded | ShardsFailed:
        async with asyncio.timeout(PATIENCE_S):
            while (verdict := self.tally.verdict) is None:
                self.changed.clear()
                await self.changed.wait()
            return verdict


class Ranks:
    """Senders and receivers of every rank, in one process, and which transfers join them."""

    def __init__(self, senders: int, receivers: int, encoder: Encoder) -> None:
        self.shards = [
            (sender, receiver, heads, shard_id(TRANSFER, heads, MODEL.num_kv_heads))
            for sender, sending in enumerate(shard_heads(MODEL.num_kv_heads, senders))
            for receiver, receiving in enumerate(shard_heads(MODEL.num_kv_heads, receivers))
            if (heads := common_heads(sending, receiving)) is not None
        ]
        ids = [transfer_id for _, _, _, transfer_id in self.shards]
        self.sent, self.landed = RankOutcomes(ids), RankOutcomes(ids)
        hub, clock = MemoryHub(), MonotonicClock()
        self.sources = [RankPool(heads, 4, rank) for rank, heads in enumerate(shard_heads(4, senders))]
        self.targets = [RankPool(heads, 16, 9 + rank) for rank, heads in enumerate(shard_heads(4, receivers))]
        self.receivers = [
            KvReceiver(
                CONFIG,
                WorkerIdentity(WorkerId(f"decode-{rank}"), Epoch(7), "test"),
                pool.layout,
                pool,
                self.landed,
                clock,
                links=MemoryLinks(hub),
                decoders=decoders_with(FlippingDecoder()),
                metrics=KvTransferMetrics(CollectorRegistry()),
            )
            for rank, pool in enumerate(self.targets)
        ]
        self.senders = [
            KvSender(
                CONFIG,
                WorkerIdentity(WorkerId(f"prefill-{rank}"), Epoch(3), "test"),
                pool.layout,
                pool,
                self.sent,
                clock,
                chooser=FixedChooser(encoder),
                links=MemoryLinks(hub),
                dialer=self,
                metrics=KvTransferMetrics(CollectorRegistry()),
            )
            for rank, pool in enumerate(self.sources)
        ]

    def dial(self, peer: Peer) -> ControlStream:
        return MemoryStream(self.receivers[int(peer.worker_id.removeprefix("decode-"))])

    async def begin(self) -> Tensor:
        """Fill the source ranks, expect and offer every shard. Returns the model's KV."""
        shape = (MODEL.num_layers, 2, MODEL.num_kv_heads, NUM_TOKENS, MODEL.head_dim)
        kv = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        for pool in self.sources:
            pool.fill(kv)
        for sender, receiver, heads, transfer_id in self.shards:
            await self.receivers[receiver].expect(transfer_id, REQUEST, HELD_TOKENS, NUM_TOKENS, heads=heads)
            peer = Peer(WorkerId(f"decode-{receiver}"), Epoch(7), "in memory")
            await self.senders[sender].offer(transfer_id, REQUEST, NUM_TOKENS, peer, heads=heads)
        return kv

    def push(self) -> None:
        for start in range(0, NUM_TOKENS, 20):
            for sender, _, _, transfer_id in self.shards:
                tokens = range(start, min(start + 20, NUM_TOKENS))
                self.senders[sender].push(transfer_id, range(MODEL.num_layers), tokens)
        for sender, _, _, transfer_id in self.shards:
            self.senders[sender].commit(transfer_id, 5)


@contextlib.asynccontextmanager
async def _ranks(senders: int, receivers: int, encoder: Encoder = RAW) -> AsyncIterator[Ranks]:
    ranks = Ranks(senders, receivers, encoder)
    try:
        yield ranks
    finally:
        await asyncio.gather(*(sender.close() for sender in ranks.senders))
        await asyncio.gather(*(receiver.close() for receiver in ranks.receivers))


@pytest.mark.parametrize("encoder", [RAW, FlippingEncoder()], ids=["raw", "coded"])
@pytest.mark.parametrize(("senders", "receivers"), [(2, 1), (1, 2), (2, 4), (4, 2)])
async def test_shards_land_bit_exactly(senders: int, receivers: int, encoder: Encoder) -> None:
    async with _ranks(senders, receivers, encoder) as ranks:
        kv = await ranks.begin()
        ranks.push()
        verdict = await ranks.landed.verdict()
        assert isinstance(verdict, ShardsLanded)
        assert verdict.first_token_id == 5
        assert verdict.stats.raw_bytes == kv[:, :, :, HELD_TOKENS:].nbytes
        landed = torch.cat([pool.whole() for pool in ranks.targets], dim=2)
        assert torch.equal(landed[:, :, :, HELD_TOKENS:], kv[:, :, :, HELD_TOKENS:])
        assert landed[:, :, :, :HELD_TOKENS].isnan().all()
        async with asyncio.timeout(PATIENCE_S):
            while len(ranks.sent.acked) < len(ranks.shards):
                ranks.sent.changed.clear()
                await ranks.sent.changed.wait()


async def test_one_shard_that_fails_fails_the_request_when_all_have_ended() -> None:
    async with _ranks(2, 1) as ranks:
        await ranks.begin()
        await ranks.senders[0].abort(ranks.shards[0][3], "rank 0 died")
        async with asyncio.timeout(PATIENCE_S):
            while not (to_cancel := ranks.landed.tally.to_cancel):
                ranks.landed.changed.clear()
                await ranks.landed.changed.wait()
        assert ranks.landed.tally.verdict is None
        for transfer_id in to_cancel:
            await ranks.receivers[0].cancel(transfer_id, "another shard failed")
        verdict = await ranks.landed.verdict()
        assert isinstance(verdict, ShardsFailed)
        assert verdict.reason == "cancelled"
        assert ranks.shards[0][3] in verdict.detail


async def test_other_heads_than_were_reserved_are_refused() -> None:
    async with _ranks(2, 1) as ranks:
        _, _, heads, transfer_id = ranks.shards[0]
        await ranks.receivers[0].expect(transfer_id, REQUEST, 0, NUM_TOKENS, heads=range(2, 4))
        peer = Peer(WorkerId("decode-0"), Epoch(7), "in memory")
        await ranks.senders[0].offer(transfer_id, REQUEST, NUM_TOKENS, peer, heads=heads)
        async with asyncio.timeout(PATIENCE_S):
            while not ranks.sent.tally.to_cancel:
                ranks.sent.changed.clear()
                await ranks.sent.changed.wait()
        assert ranks.sent.tally._failure is not None
        assert ranks.sent.tally._failure.reason == "layout"
