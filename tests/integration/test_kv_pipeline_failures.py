"""Coded transfers that end early: codecs and pools that fail, aborts while a frame is being coded, links that break."""

import asyncio
import threading

import pytest
import torch

from kv_transfer.codec import Encoded
from kv_transfer.frame import FrameRefused
from kv_transfer.session import NackReason
from tests.kv_coded_pair import CONFIG, Coded, is_set
from tests.kv_peers import PATIENCE_S


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
        await is_set(coded.encoder.stops.entered[0])
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
        await is_set(coded.decoder.stops.entered[0])
        await asyncio.wait_for(duo.receiver.cancel(transfer_id, "disconnect"), PATIENCE_S)
        assert await coded.settled(transfer_id) == ("cancelled", "cancelled")
        coded.decoder.stops.release()
        await is_set(coded.decoder.stops.left[0])
        assert duo.target.writes == []
    assert duo.target.writes == []
    coded.check_nothing_is_lent()


async def test_cancel_returns_only_when_no_codec_thread_is_writing() -> None:
    coded = Coded()
    async with coded.duo as duo:
        duo.target.blocked_by = threading.Event()
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        coded.push(transfer_id, 8)
        await is_set(duo.target.is_entered)
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
        await is_set(stops.entered[0])
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
        await is_set(coded.decoder.stops.entered[8])
        stream = duo.dialer.streams[0]
        await stream.until_said("commit")
        await stream.until_served()
        coded.links.ends[0].abort()
        coded.decoder.stops.release()
        assert await coded.settled(transfer_id) == ("acked", "landed")
        assert torch.equal(kv, target)


# --- profiles ---------------------------------------------------------------------------------------------------------
