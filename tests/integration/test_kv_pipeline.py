"""Coded transfers: frames are encoded ahead of the wire and decoded behind it, and nothing else changes."""

import dataclasses

import pytest
import torch

from kv_transfer.carriers.memory_links import MemoryHub, MemoryLinks
from kv_transfer.codec import RAW, Encoded
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES
from tests.kv_codecs import FixedChooser
from tests.kv_coded_pair import CONFIG, FRAME_TOKENS, LAYERS, Coded, is_set
from tests.kv_peers import LAYOUT, Duo


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
        assert stats.raw_bytes == kv[:, :, :, 5:].nbytes
        assert stats.wire_bytes >= stats.raw_bytes + stats.num_frames * HEADER_BYTES
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
            await is_set(stops.entered[start])  # all three, while none has left
        stops.release(16, 8)
        for start in (24, 32):
            await is_set(stops.left[start])  # made ahead by the threads that became free
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
        await is_set(coded.decoder.stops.entered[0])
        await is_set(coded.encoder.stops.entered[16])
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
        await is_set(coded.decoder.stops.entered[8])
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
            await is_set(coded.decoder.stops.left[start])
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
        assert stats.raw_bytes == kv.nbytes > stats.wire_bytes
        assert 4 <= stats.num_frames <= 8
        assert torch.equal(kv, target) == (rung == "lossless")
        assert torch.allclose(kv, target, rtol=0.2, atol=0.2)


# --- failures ---------------------------------------------------------------------------------------------------------


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
