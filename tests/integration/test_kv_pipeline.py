"""Coded transfers: frames are encoded ahead of the wire and decoded behind it, and nothing else changes."""

import asyncio
import dataclasses
import threading

import pytest
import torch

from core.ids import TransferId
from kv_transfer.codec import RAW, Encoded
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES, FrameRefused, decode_header
from kv_transfer.link import LinkPlan, ReceiveEnd, SendEnd, Slot
from kv_transfer.memory_links import MemoryHub, MemoryLinks
from kv_transfer.session import NackReason
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


async def _set(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE_S)


@pytest.mark.parametrize("chunk", [1, 10, 37], ids=["token by token", "ragged chunks", "at once"])
@pytest.mark.parametrize("group", [1, 3], ids=["layer by layer", "all layers"])
async def test_coded_parts_land_bit_exactly(chunk: int, group: int) -> None:
    coded = Coded()
    async with coded.duo as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=37, held_tokens=5)
        for start in range(0, 37, chunk):
            for layer in range(0, LAYOUT.num_layers, group):
                duo.sender.push(transfer_id, range(layer, layer + group), range(start, min(start + chunk, 37)))
        duo.sender.commit(transfer_id, 1)
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert torch.equal(kv[:, :, :, 5:], target[:, :, :, 5:])
        stats = duo.landed.stats[transfer_id]
        assert stats.payload_bytes == kv[:, :, :, 5:].nbytes
        assert stats.wire_bytes >= stats.payload_bytes + stats.num_frames * HEADER_BYTES
        assert (stats.profile, stats.profile_is_lossless) == ("flip", True)
    coded.check_nothing_is_lent()


async def test_frames_are_encoded_at_once_and_sent_in_order() -> None:
    coded = Coded()
    stops = coded.encoder.stops
    stops.hold(0, 8, 16)
    async with coded.duo as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=40)
        coded.push(transfer_id, 40)
        for start in (0, 8, 16):
            await _set(stops.entered[start])  # all three, while none has left
        stops.release(16, 8)
        for start in (24, 32):
            await _set(stops.left[start])  # made ahead by the threads that became free
        assert coded.links.starts == []  # the first is not made yet: nothing may overtake it
        stops.release(0)
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert coded.links.starts == [0, 8, 16, 24, 32]
        assert torch.equal(kv, target)


async def test_a_frame_is_encoded_while_one_is_sent_and_one_is_decoded() -> None:
    coded = Coded()
    coded.encoder.stops.hold(16)
    coded.decoder.stops.hold(0)
    async with coded.duo as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=24)
        coded.push(transfer_id, 24)
        await _set(coded.decoder.stops.entered[0])
        await _set(coded.encoder.stops.entered[16])
        await coded.links.until_sent(2)  # 0 and 8 crossed; 0 is inside the decoder, 16 inside the encoder
        coded.encoder.stops.release()
        coded.decoder.stops.release()
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)


async def test_a_slot_is_free_before_its_frame_is_decoded_and_the_line_is_bounded() -> None:
    coded = Coded(CONFIG.model_copy(update={"codec_threads": 2, "credit_bytes": 262144}))
    num_tokens = 20 * FRAME_TOKENS
    coded.decoder.stops.hold(*range(0, num_tokens, FRAME_TOKENS))
    async with coded.duo as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens)
        coded.push(transfer_id, num_tokens)
        await coded.links.until_sent(5)  # two slots, and yet: four frames are with the decoders
        await _set(coded.decoder.stops.entered[8])
        assert len(coded.links.starts) <= 4 + 2 + 1  # in the line, in slots, and one in the receiver thread's hands
        assert not coded.decoder.stops.entered[16].is_set()
        coded.decoder.stops.release()
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)
    coded.check_nothing_is_lent()


async def test_parts_are_coded_before_the_next_is_pushed() -> None:
    coded = Coded()
    async with coded.duo as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=24)
        for start in range(0, 24, 8):
            duo.sender.push(transfer_id, LAYERS, range(start, start + 8))
            await _set(coded.decoder.stops.left[start])
        duo.sender.commit(transfer_id, 1)
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)


async def test_coded_and_raw_transfers_share_a_pair() -> None:
    coded = Coded()
    async with coded.duo as duo:
        begun = []
        for index in range(8):
            begun.append(await duo.begin(f"r{index}", num_tokens=30 + index))
            await duo.dialer.streams[0].until_heard("reserved", count=index + 1)
            coded.chooser.encoder = RAW if index % 2 == 0 else coded.encoder
        for transfer_id, kv, _ in reversed(begun):
            coded.push(transfer_id, kv.shape[3])
        for transfer_id, kv, target in begun:
            assert await coded.settled(transfer_id) == ("acked", "landed")
            assert torch.equal(kv, target)
    coded.check_nothing_is_lent()


async def test_a_frame_may_hold_more_than_a_slot_when_it_is_coded() -> None:
    coded = Coded(CONFIG.model_copy(update={"min_frame_raw_bytes": 9216}))
    coded.encoder.bound = 1 / 3
    coded.encoder.encode = lambda kv, payload, place: Encoded(b"", (kv.nbytes // 3,))  # type: ignore[method-assign]
    coded.decoder.decode = (  # type: ignore[method-assign]
        lambda params, sections, shape, dtype: torch.ones(*shape, dtype=dtype)
    )
    async with coded.duo as duo:
        transfer_id, _, target = await duo.begin("a", num_tokens=48)
        coded.push(transfer_id, 48)
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert coded.links.starts == [0, 24]
        assert (target == 1).all()


@pytest.mark.parametrize("rung", ["lossless", "fp8"])
async def test_rungs_of_the_ladder_cross(rung: str) -> None:
    hub = MemoryHub()
    chooser = FixedChooser(open_encoder(ladder()[rung]), rung)
    layout = dataclasses.replace(LAYOUT, dtype="bfloat16", head_dim=64)
    config = KvTransferConfig(backend="memory", min_frame_raw_bytes=16384, frames_per_transfer=4)
    links = (MemoryLinks(hub), MemoryLinks(hub))
    async with Duo(config, links=links, chooser=chooser, sender_layout=layout, receiver_layout=layout) as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=200)
        duo.sender.push(transfer_id, LAYERS, range(200))
        duo.sender.commit(transfer_id, 1)
        assert await duo.sent.outcome(transfer_id) == "acked"
        assert await duo.landed.outcome(transfer_id) == "landed"
        stats = duo.landed.stats[transfer_id]
        assert (stats.profile, stats.profile_is_lossless) == (rung, rung == "lossless")
        assert stats.payload_bytes == kv.nbytes > stats.wire_bytes
        assert 4 <= stats.num_frames <= 8
        assert torch.equal(kv, target) == (rung == "lossless")
        assert torch.allclose(kv, target, rtol=0.2, atol=0.2)


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_an_encoder_that_fails_ends_its_transfer_alone() -> None:
    coded = Coded()
    coded.encoder.fails_at = 16
    async with coded.duo as duo:
        failed, _, _ = await duo.begin("a", num_tokens=40)
        coded.push(failed, 40)
        assert await coded.settled(failed) == ("codec", "codec")
        assert "this encoder fails here" in duo.sent.told[failed][0][1]
        other, kv, target = await duo.begin("b", num_tokens=16)
        coded.push(other, 16)
        assert await coded.settled(other) == ("acked", "landed")
        assert torch.equal(kv, target)
    coded.check_nothing_is_lent()


async def test_an_encoder_that_does_not_end_fails_its_transfer() -> None:
    coded = Coded(CONFIG.model_copy(update={"codec_timeout_s": 0.2}))
    coded.encoder.stops.hold(0)
    async with coded.duo as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        coded.push(transfer_id, 8)
        assert await coded.settled(transfer_id) == ("codec", "codec")
        assert "was not encoded within" in duo.sent.told[transfer_id][0][1]
        coded.encoder.stops.release()


async def test_an_encoder_that_breaks_its_promise_is_refused_here() -> None:
    coded = Coded()
    coded.encoder.encode = lambda kv, payload, place: Encoded(b"", (10**9,))  # type: ignore[method-assign]
    async with coded.duo as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        coded.push(transfer_id, 8)
        assert await coded.settled(transfer_id) == ("codec", "codec")
        assert coded.links.starts == []


@pytest.mark.parametrize("error", [FrameRefused(NackReason.CODEC, "no"), ZeroDivisionError("a crash")])
async def test_a_decoder_that_refuses_or_crashes_ends_its_transfer_alone(error: Exception) -> None:
    coded = Coded()
    coded.decoder.error = error
    async with coded.duo as duo:
        failed, _, _ = await duo.begin("a", num_tokens=40)
        coded.push(failed, 40)
        assert await coded.settled(failed) == ("codec", "codec")
        assert duo.target.writes == []
        assert duo.receiver_metrics.frames_refused.labels("codec")._value.get() >= 1
        coded.decoder.error = None
        other, kv, target = await duo.begin("b", num_tokens=16)
        coded.push(other, 16)
        assert await coded.settled(other) == ("acked", "landed")
        assert torch.equal(kv, target)
    coded.check_nothing_is_lent()


async def test_a_codec_that_the_receiver_does_not_know_is_refused() -> None:
    coded = Coded()
    coded.encoder.codec_id = 251
    async with coded.duo as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        coded.push(transfer_id, 8)
        assert await coded.settled(transfer_id) == ("codec", "codec")


async def test_a_pool_that_refuses_fails_a_coded_transfer() -> None:
    coded = Coded()
    async with coded.duo as duo:
        unread, _, _ = await duo.begin("a", num_tokens=8)
        unwritten, _, _ = await duo.begin("b", num_tokens=8)
        del duo.source.arrays[unread.split("/")[0]]  # type: ignore[arg-type]
        del duo.target.arrays[unwritten.split("/")[0]]  # type: ignore[arg-type]
        coded.push(unread, 8)
        coded.push(unwritten, 8)
        assert await coded.settled(unread) == ("pool", "pool")
        assert await coded.settled(unwritten) == ("pool", "pool")
    coded.check_nothing_is_lent()


async def test_an_abort_does_not_wait_for_an_encoder_and_what_it_made_is_dropped() -> None:
    coded = Coded()
    coded.encoder.stops.hold(0, 8)
    async with coded.duo as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=40)
        coded.push(transfer_id, 40)
        await _set(coded.encoder.stops.entered[0])
        await asyncio.wait_for(duo.sender.abort(transfer_id, "disconnect"), PATIENCE_S)
        assert await coded.settled(transfer_id) == ("cancelled", "cancelled")
        assert duo.source.num_inside == 0
        coded.encoder.stops.release()
        coded.encoder.stops._closed.clear()
        other, kv, target = await duo.begin("b", num_tokens=16)
        coded.push(other, 16)
        assert await coded.settled(other) == ("acked", "landed")
        assert torch.equal(kv, target)
        assert coded.links.starts == [0, 8]
    coded.check_nothing_is_lent()


async def test_a_cancel_does_not_wait_for_a_decoder_and_nothing_is_written_after_it() -> None:
    coded = Coded()
    coded.decoder.stops.hold(0)
    async with coded.duo as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        coded.push(transfer_id, 8)
        await _set(coded.decoder.stops.entered[0])
        await asyncio.wait_for(duo.receiver.cancel(transfer_id, "disconnect"), PATIENCE_S)
        assert await coded.settled(transfer_id) == ("cancelled", "cancelled")
        coded.decoder.stops.release()
        await _set(coded.decoder.stops.left[0])
        assert duo.target.writes == []
    assert duo.target.writes == []
    coded.check_nothing_is_lent()


async def test_cancel_returns_only_when_no_codec_thread_is_writing() -> None:
    coded = Coded()
    async with coded.duo as duo:
        duo.target.blocked_by = threading.Event()
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        coded.push(transfer_id, 8)
        await _set(duo.target.is_entered)
        cancelling = asyncio.create_task(duo.receiver.cancel(transfer_id, "disconnect"))
        assert await duo.sent.outcome(transfer_id) == "cancelled"
        assert not cancelling.done()
        duo.target.blocked_by.set()
        await asyncio.wait_for(cancelling, PATIENCE_S)
        assert duo.target.num_inside == 0


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_closing_waits_for_the_codec_for_a_while(side: str) -> None:
    coded = Coded(CONFIG.model_copy(update={"close_timeout_s": 0.1}))
    stops = coded.encoder.stops if side == "sender" else coded.decoder.stops
    stops.hold(0)
    async with coded.duo as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        coded.push(transfer_id, 8)
        await _set(stops.entered[0])
        await asyncio.wait_for(duo.sender.close() if side == "sender" else duo.receiver.close(), PATIENCE_S)
        outcomes = await coded.settled(transfer_id)
        assert "closed" in outcomes
        stops.release()


async def test_what_arrived_before_the_link_broke_still_lands() -> None:
    coded = Coded()
    coded.decoder.stops.hold(0, 8)
    async with coded.duo as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=16)
        coded.push(transfer_id, 16)
        await _set(coded.decoder.stops.entered[8])
        stream = duo.dialer.streams[0]
        await stream.until_said("commit")
        await stream.until_served()
        coded.links.ends[0].abort()
        coded.decoder.stops.release()
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)


# --- profiles ---------------------------------------------------------------------------------------------------------


async def test_whether_a_profile_loses_bits_is_read_off_the_frames() -> None:
    coded = Coded()
    coded.decoder.is_lossy = True
    async with coded.duo as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        coded.push(transfer_id, 8)
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert not duo.landed.stats[transfer_id].profile_is_lossless


async def test_the_chooser_is_asked_once_and_told_once() -> None:
    coded = Coded()
    async with coded.duo as duo:
        landed, kv, _ = await duo.begin("landed", num_tokens=16, held_tokens=4)
        coded.push(landed, 16)
        await coded.settled(landed)
        aborted, _, _ = await duo.begin("aborted", num_tokens=16)
        await duo.dialer.streams[0].until_heard("reserved", count=2)
        await duo.sender.abort(aborted, "disconnect")
        held, _, _ = await duo.begin("held", num_tokens=16, held_tokens=16)
        coded.push(held, 16)
        await coded.settled(held)
        offered, _, _ = await duo.begin("offered", num_tokens=16)
        await duo.sender.abort(offered, "disconnect")  # perhaps before it was reserved
        asked = {question.transfer_id: question for question in coded.chooser.asked}
        assert set(coded.chooser.observed) == set(asked) >= {landed, aborted}
        assert held not in asked
        assert all(len(told) == 1 for told in coded.chooser.observed.values())
        question, (observed,) = asked[landed], coded.chooser.observed[landed]
        assert (question.raw_bytes, question.num_tokens) == (kv[:, :, :, 4:].nbytes, 16)
        assert question.peer == "decode"
        assert (observed.raw_bytes, observed.failure) == (question.raw_bytes, "")
        assert observed.payload_bytes >= question.raw_bytes
        assert observed.exposed_s is not None
        (failed,) = coded.chooser.observed[aborted]
        assert (failed.failure, failed.exposed_s, failed.payload_bytes) == ("cancelled", None, 0)
        assert duo.sender_metrics.decisions.labels("flip", "test")._value.get() == len(asked)


async def test_a_chooser_that_fails_costs_no_transfer() -> None:
    coded = Coded()
    coded.chooser.choose = lambda question: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    async with coded.duo as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=16)
        coded.push(transfer_id, 16)
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)
        assert coded.chooser.observed == {}
        assert duo.sender_metrics.decisions.labels("none", "chooser_failed")._value.get() == 1


async def test_the_second_question_knows_the_link() -> None:
    coded = Coded()
    async with coded.duo as duo:
        for name in ("a", "b"):
            transfer_id, _, _ = await duo.begin(name, num_tokens=64)
            coded.push(transfer_id, 64)
            assert await coded.settled(transfer_id) == ("acked", "landed")
        first, second = (question.link for question in coded.chooser.asked)
        assert (first.carrier, first.goodput_bytes_per_s, first.queued_bytes) == ("memory", None, 0)
        assert second.carrier == "memory"
        assert second.rtt_s is not None
        assert second.queued_bytes == 0
