"""A sender and a receiver in one process: parts go in on one side, KV and outcomes come out on the other."""

import asyncio
import dataclasses
import threading

import pytest
import torch

from core.clock import ManualClock
from core.errors import DuplicateRequest, TransferError
from core.ids import Epoch, RequestId, TransferId, WorkerId
from kv_transfer.config import KvTransferConfig
from kv_transfer.ports import Peer
from protos import kv_transfer_pb2 as pb
from tests.kv_peers import LAYOUT, PATIENCE_S, ArrayPool, Duo

LAYERS = range(LAYOUT.num_layers)


async def _inside(pool: ArrayPool) -> None:
    """Wait until somebody is inside the pool."""
    assert await asyncio.to_thread(pool.is_entered.wait, PATIENCE_S)


async def _settled(duo: Duo, transfer_id: TransferId) -> tuple[str, str]:
    """Return the outcomes of sender and receiver."""
    return await duo.sent.outcome(transfer_id), await duo.landed.outcome(transfer_id)


@pytest.mark.parametrize("chunk", [1, 10, 37], ids=["token by token", "ragged chunks", "at once"])
@pytest.mark.parametrize("group", [1, 3], ids=["layer by layer", "all layers"])
async def test_parts_land_bit_exactly(chunk: int, group: int) -> None:
    async with Duo() as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=37)
        for start in range(0, 37, chunk):
            for layer in range(0, LAYOUT.num_layers, group):
                duo.sender.push(transfer_id, range(layer, layer + group), range(start, min(start + chunk, 37)))
        duo.sender.commit(transfer_id, first_token_id=42)
        assert await _settled(duo, transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)
        assert duo.landed.first_tokens[transfer_id] == 42
        stats = duo.landed.stats[transfer_id]
        assert stats.raw_bytes == kv.nbytes
        assert stats.num_frames == len(duo.target.writes)
        assert duo.sender_metrics.acked_exposed_seconds._sum.get() == stats.exposed_s


async def test_what_the_receiver_holds_is_not_sent() -> None:
    async with Duo() as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=37, held_tokens=13)
        for start in range(0, 37, 10):
            duo.sender.push(transfer_id, LAYERS, range(start, min(start + 10, 37)))
        duo.sender.commit(transfer_id, 1)
        assert await _settled(duo, transfer_id) == ("acked", "landed")
        assert target[:, :, :, :13].isnan().all()
        assert torch.equal(kv[:, :, :, 13:], target[:, :, :, 13:])
        assert duo.landed.stats[transfer_id].raw_bytes == kv[:, :, :, 13:].nbytes


async def test_a_prompt_that_is_held_whole_lands_without_a_frame() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8, held_tokens=8)
        duo.sender.push(transfer_id, LAYERS, range(8))
        duo.sender.commit(transfer_id, 1)
        assert await _settled(duo, transfer_id) == ("acked", "landed")
        assert duo.target.writes == []


async def test_block_sizes_may_differ() -> None:
    other = dataclasses.replace(LAYOUT, block_size=16)
    async with Duo(receiver_layout=other) as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=50, held_tokens=16)
        duo.sender.push(transfer_id, LAYERS, range(50))
        duo.sender.commit(transfer_id, 1)
        assert await _settled(duo, transfer_id) == ("acked", "landed")
        assert torch.equal(kv[:, :, :, 16:], target[:, :, :, 16:])


async def test_many_transfers_share_a_pair() -> None:
    async with Duo() as duo:
        begun = [await duo.begin(f"r{index}", num_tokens=11 + index) for index in range(20)]
        for transfer_id, kv, _ in reversed(begun):
            duo.sender.push(transfer_id, LAYERS, range(kv.shape[3]))
            duo.sender.commit(transfer_id, 1)
        for transfer_id, kv, target in begun:
            assert await _settled(duo, transfer_id) == ("acked", "landed")
            assert torch.equal(kv, target)
        assert len(duo.dialer.streams) == 1


async def test_an_offer_may_come_before_its_reservation() -> None:
    async with Duo() as duo:
        transfer_id, request_id = TransferId("a/0"), RequestId("a")
        kv, target = duo.source.fill(request_id, 9), duo.target.clear(request_id, 9)
        await duo.sender.offer(transfer_id, request_id, 9, duo.peer)
        duo.sender.push(transfer_id, LAYERS, range(9))
        duo.sender.commit(transfer_id, 1)
        stream = duo.dialer.streams[0]
        await stream.until_offered()
        await duo.receiver.expect(transfer_id, request_id, 0, 9)
        assert await _settled(duo, transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)


async def test_an_offer_that_nobody_expects_is_refused() -> None:
    config = KvTransferConfig(backend="memory", slot_bytes=4096, credit_bytes=16384, offer_timeout_s=0.2)
    async with Duo(config) as duo:
        duo.source.fill(RequestId("a"), 9)
        await duo.sender.offer(TransferId("a/0"), RequestId("a"), 9, duo.peer)
        assert await duo.sent.outcome(TransferId("a/0")) in ("unknown_transfer", "lease_expired")
        assert duo.landed.told == {}


async def test_offers_past_the_cap_of_strays_are_refused_at_once() -> None:
    config = KvTransferConfig(backend="memory", slot_bytes=4096, credit_bytes=16384, max_strays=2)
    async with Duo(config) as duo:
        for name in ("a", "b", "c"):
            await duo.sender.offer(TransferId(name), RequestId(name), 9, duo.peer)
        assert await duo.sent.outcome(TransferId("c")) == "receiver_full"


async def test_a_transfer_cannot_be_offered_or_expected_twice() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        with pytest.raises(DuplicateRequest):
            await duo.sender.offer(transfer_id, RequestId("a"), 8, duo.peer)
        with pytest.raises(DuplicateRequest):
            await duo.receiver.expect(transfer_id, RequestId("a"), 0, 8)


async def test_another_model_is_refused_by_its_layout() -> None:
    async with Duo(receiver_layout=dataclasses.replace(LAYOUT, weights_version="other")) as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        assert await duo.sent.outcome(transfer_id) == "peer_lost"
        assert "different models" in duo.sent.told[transfer_id][0][1]
        await duo.receiver.cancel(transfer_id, "rejected")


async def test_another_incarnation_is_refused_by_its_epoch() -> None:
    async with Duo() as duo:
        duo.peer = Peer(WorkerId("decode"), Epoch(6), "in memory")
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        assert await duo.sent.outcome(transfer_id) == "peer_lost"
        assert "epoch 6 was meant" in duo.sent.told[transfer_id][0][1]
        await duo.receiver.cancel(transfer_id, "rejected")
        duo.peer = Peer(WorkerId("decode"), Epoch(7), "in memory")
        again, _, _ = await duo.begin("b", num_tokens=8)
        with pytest.raises(TransferError):
            await duo.sender.offer(TransferId("c"), RequestId("c"), 8, Peer(WorkerId("decode"), Epoch(6), "in memory"))
        await duo.sender.abort(again, "enough")


# --- aborts, in every state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("moment", ["offered", "reserved", "sending"])
async def test_an_abort_ends_both_sides(side: str, moment: str) -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=40)
        stream = duo.dialer.streams[0]
        if moment != "offered":
            await stream.until_heard("reserved")
        if moment == "sending":
            duo.sender.push(transfer_id, LAYERS, range(16))
            await _inside(duo.target)
        if side == "sender":
            await duo.sender.abort(transfer_id, "disconnect")
        else:
            await duo.receiver.cancel(transfer_id, "disconnect")
        assert await _settled(duo, transfer_id) == ("cancelled", "cancelled")
        num_writes = len(duo.target.writes)
        duo.sender.push(transfer_id, LAYERS, range(16, 40))  # the engine has not heard of it yet
        duo.sender.commit(transfer_id, 1)
        after, kv, target = await duo.begin("b", num_tokens=8)
        duo.sender.push(after, LAYERS, range(8))
        duo.sender.commit(after, 1)
        assert await _settled(duo, after) == ("acked", "landed")
        assert torch.equal(kv, target)
        assert all(request_id == "b" for request_id, _, _ in duo.target.writes[num_writes:])


async def test_cancel_returns_only_when_no_write_is_inside() -> None:
    async with Duo() as duo:
        duo.target.blocked_by = threading.Event()
        transfer_id, _, _ = await duo.begin("a", num_tokens=40)
        duo.sender.push(transfer_id, LAYERS, range(40))
        await _inside(duo.target)
        cancelling = asyncio.create_task(duo.receiver.cancel(transfer_id, "disconnect"))
        assert await duo.sent.outcome(transfer_id) == "cancelled"  # the peer is told at once
        assert not cancelling.done()
        assert transfer_id not in duo.landed.told
        duo.target.blocked_by.set()
        await asyncio.wait_for(cancelling, PATIENCE_S)
        assert duo.target.num_inside == 0
        assert await duo.landed.outcome(transfer_id) == "cancelled"
        del duo.target.arrays[RequestId("a")]  # freed: a write from now on would raise and be told as POOL
        assert len(duo.target.writes) == 1


async def test_abort_returns_only_when_no_read_is_inside() -> None:
    async with Duo() as duo:
        duo.source.blocked_by = threading.Event()
        transfer_id, _, _ = await duo.begin("a", num_tokens=40)
        duo.sender.push(transfer_id, LAYERS, range(40))
        await _inside(duo.source)
        aborting = asyncio.create_task(duo.sender.abort(transfer_id, "disconnect"))
        assert await duo.landed.outcome(transfer_id) == "cancelled"
        assert not aborting.done()
        duo.source.blocked_by.set()
        await asyncio.wait_for(aborting, PATIENCE_S)
        assert duo.source.num_inside == 0


async def test_a_transfer_that_landed_cannot_be_cancelled() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        duo.sender.push(transfer_id, LAYERS, range(8))
        duo.sender.commit(transfer_id, 1)
        await duo.landed.outcome(transfer_id)
        await duo.receiver.cancel(transfer_id, "late")
        assert await _settled(duo, transfer_id) == ("acked", "landed")


# --- silence, loss, repetition ----------------------------------------------------------------------------------------


async def test_a_lease_that_nobody_renews_expires_and_both_sides_hear_why() -> None:
    clock = ManualClock()
    async with Duo(clock=clock) as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        stream = duo.dialer.streams[0]
        await stream.until_heard("reserved")
        for _ in range(10):  # heartbeats keep it, however long the prefill computes
            clock.advance(11)
            duo.sender.tick()
            await stream.until_served()
            duo.receiver.tick()
        assert duo.landed.told == {}
        clock.advance(31)
        duo.receiver.tick()
        assert await _settled(duo, transfer_id) == ("lease_expired", "lease_expired")


async def test_a_reservation_that_is_never_offered_expires() -> None:
    clock = ManualClock()
    async with Duo(clock=clock) as duo:
        await duo.receiver.expect(TransferId("a"), RequestId("a"), 0, 8, lease_s=5.0)
        clock.advance(4.9)
        duo.receiver.tick()
        assert duo.landed.told == {}
        clock.advance(0.2)
        duo.receiver.tick()
        assert await duo.landed.outcome(TransferId("a")) == "lease_expired"
        with pytest.raises(TransferError):
            await duo.receiver.expect(TransferId("a"), RequestId("a"), 0, 8)


async def test_the_end_of_the_control_stream_ends_what_is_not_acknowledged() -> None:
    async with Duo() as duo:
        done, _, _ = await duo.begin("done", num_tokens=8)
        duo.sender.push(done, LAYERS, range(8))
        duo.sender.commit(done, 1)
        await duo.sent.outcome(done)
        transfer_id, _, _ = await duo.begin("a", num_tokens=40)
        duo.sender.push(transfer_id, LAYERS, range(16))
        duo.target.is_entered.clear()
        await _inside(duo.target)
        duo.dialer.streams[0].break_off()
        assert await _settled(duo, transfer_id) == ("peer_lost", "peer_lost")
        again, kv, target = await duo.begin("b", num_tokens=8)  # over a new stream and a new link
        duo.sender.push(again, LAYERS, range(8))
        duo.sender.commit(again, 1)
        assert await _settled(duo, again) == ("acked", "landed")
        assert torch.equal(kv, target)
        assert len(duo.dialer.streams) == 2


async def test_repeated_and_late_control_messages_change_nothing() -> None:
    async with Duo() as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=8)
        stream = duo.dialer.streams[0]
        duo.sender.push(transfer_id, LAYERS, range(8))
        duo.sender.commit(transfer_id, 1)
        assert await _settled(duo, transfer_id) == ("acked", "landed")
        num_heard = len(stream.heard)
        for message in list(stream.sent[1:]):
            stream.to_receiver.put_nowait(message)
        for heard in list(stream.heard[1:]):
            if heard.WhichOneof("message") in ("reserved", "ack", "nack"):
                stream.to_sender.put_nowait(heard)
        again, _, _ = await duo.begin("b", num_tokens=8)
        duo.sender.push(again, LAYERS, range(8))
        duo.sender.commit(again, 1)
        assert await _settled(duo, again) == ("acked", "landed")
        assert torch.equal(kv, target)
        kinds = [message.WhichOneof("message") for message in stream.heard[num_heard:]]
        assert kinds.count("ack") >= 2  # the old commit was answered again
        assert len(duo.sent.told[transfer_id]) == len(duo.landed.told[transfer_id]) == 1


async def test_a_message_out_of_place_ends_only_its_transfer() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        other, _, _ = await duo.begin("b", num_tokens=8)
        stream = duo.dialer.streams[0]
        await stream.until_heard("reserved", count=2)
        stream.to_sender.put_nowait(pb.ReceiverMessage(ack=pb.Ack(transfer_id=transfer_id)))
        assert await _settled(duo, transfer_id) == ("protocol", "protocol")
        duo.sender.push(other, LAYERS, range(8))
        duo.sender.commit(other, 1)
        assert await _settled(duo, other) == ("acked", "landed")


async def test_credit_bounds_what_is_sent_and_not_yet_written() -> None:
    config = KvTransferConfig(backend="memory", slot_bytes=4096, num_slots=8, credit_bytes=8192)
    async with Duo(config) as duo:
        duo.target.blocked_by = threading.Event()
        transfer_id, kv, target = await duo.begin("a", num_tokens=64)
        duo.sender.push(transfer_id, LAYERS, range(64))
        duo.sender.commit(transfer_id, 1)
        await _inside(duo.target)
        other = asyncio.create_task(duo.sent.outcome(transfer_id))
        done, _ = await asyncio.wait([other], timeout=0.3)
        assert not done
        sent = duo.sender_metrics.payload_bytes.labels("sender")._value.get()
        assert 0 < sent <= 8192
        duo.target.blocked_by.set()
        assert await _settled(duo, transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)


async def test_a_pool_that_refuses_a_read_fails_the_transfer_alone() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        del duo.source.arrays[RequestId("a")]
        duo.sender.push(transfer_id, LAYERS, range(8))
        assert await _settled(duo, transfer_id) == ("pool", "pool")


async def test_a_pool_that_refuses_a_write_is_a_nack() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        del duo.target.arrays[RequestId("a")]
        duo.sender.push(transfer_id, LAYERS, range(8))
        assert await _settled(duo, transfer_id) == ("pool", "pool")


async def test_a_commit_with_a_hole_is_a_nack() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        duo.sender.push(transfer_id, LAYERS, range(6))
        duo.sender.commit(transfer_id, 1)
        assert await _settled(duo, transfer_id) == ("length", "length")


async def test_a_part_that_is_pushed_twice_is_a_nack() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        duo.sender.push(transfer_id, LAYERS, range(8))
        duo.sender.push(transfer_id, LAYERS, range(8))
        duo.sender.commit(transfer_id, 1)
        assert await _settled(duo, transfer_id) == ("duplicate", "duplicate")
        assert duo.receiver_metrics.frames_refused.labels("duplicate")._value.get() == 1


async def test_closing_the_sender_fails_what_is_live() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        await duo.dialer.streams[0].until_heard("reserved")
        await duo.sender.close()
        assert await _settled(duo, transfer_id) == ("closed", "closed")
        with pytest.raises(TransferError):
            await duo.sender.offer(TransferId("b"), RequestId("b"), 8, duo.peer)


async def test_closing_the_receiver_fails_what_is_live() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        await duo.receiver.close()
        sent, landed = await _settled(duo, transfer_id)
        assert landed == "closed"
        assert sent in ("closed", "peer_lost")
        with pytest.raises(TransferError):
            await duo.receiver.expect(TransferId("b"), RequestId("b"), 0, 8)
