"""Faults on the link, with real gloo between the two ends: damage, loss, and a peer that is stuck."""

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch

from core.ids import RequestId, TransferId
from kv_transfer.carriers.links import open_links
from kv_transfer.carriers.process_group_links import ProcessGroupLinks
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES, decode_header, seal
from kv_transfer.link import LinkPlan, Links, ReceiveEnd, SendEnd, Slot
from tests.kv_codecs import FixedChooser
from tests.kv_peers import LAYOUT, PATIENCE_S, Duo, WatchedDialer

LAYERS = range(LAYOUT.num_layers)
CONFIG = KvTransferConfig(backend="gloo", slot_bytes=4096, credit_bytes=16384, send_timeout_s=PATIENCE_S)
Spoil = Callable[[memoryview], None]


class SpoilingLinks:
    """A carrier whose sending ends change messages on the way, and can be got at."""

    def __init__(self, inner: Links) -> None:
        self._inner = inner
        self.spoil: Spoil | None = None
        self.send_ends: list[SendEnd] = []
        self.backend = inner.backend

    def host(self) -> str:
        return self._inner.host()

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        end = self._inner.open_send(address, plan)
        self.send_ends.append(end)
        return _SpoilingEnd(end, self)

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        return self._inner.open_receive(plan)

    def close(self) -> None:
        self._inner.close()


class _SpoilingEnd:
    def __init__(self, inner: SendEnd, links: SpoilingLinks) -> None:
        self._inner = inner
        self._links = links
        self.carrier = inner.carrier

    def acquire(self, timeout_s: float) -> Slot:
        return self._inner.acquire(timeout_s)

    def send(self, slot: Slot, num_bytes: int) -> None:
        if self._links.spoil is not None:
            self._links.spoil(slot.view())
        self._inner.send(slot, num_bytes)

    def flush(self, timeout_s: float) -> None:
        self._inner.flush(timeout_s)

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()


def _gloo_duo(config: KvTransferConfig = CONFIG, receiver_id: str = "decode") -> tuple[Duo, SpoilingLinks]:
    links = SpoilingLinks(ProcessGroupLinks("gloo", "127.0.0.1"))
    return Duo(config, links=(links, ProcessGroupLinks("gloo", "127.0.0.1")), receiver_id=receiver_id), links


async def _land(duo: Duo, name: str) -> None:
    transfer_id, kv, target = await duo.begin(name, num_tokens=9)
    duo.sender.push(transfer_id, LAYERS, range(9))
    duo.sender.commit(transfer_id, 1)
    assert await duo.landed.outcome(transfer_id) == "landed"
    assert await duo.sent.outcome(transfer_id) == "acked"
    assert torch.equal(kv, target)


def _flip_payload(message: memoryview) -> None:
    message[HEADER_BYTES + 5] ^= 1


def _reseal(**changes: object) -> Spoil:
    def spoil(message: memoryview) -> None:
        header = decode_header(message[:HEADER_BYTES], len(message) - HEADER_BYTES)
        for name, value in changes.items():
            object.__setattr__(header, name, value)
        seal(header, message)

    return spoil


def _overwrite(offset: int, value: bytes) -> Spoil:
    def spoil(message: memoryview) -> None:
        message[offset : offset + len(value)] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_flip_payload, "checksum"),
        (_reseal(sender_epoch=2), "epoch"),
        (_reseal(link_epoch=9), "epoch"),
        (_reseal(head_dim=16, dtype="bfloat16"), "shape"),
        (_reseal(codec_id=200), "codec"),
        (_reseal(section_bytes=(10**15,)), "length"),
        (_reseal(raw_bytes=4), "length"),
        (_overwrite(0, bytes(HEADER_BYTES)), "link_lost"),
        (_overwrite(4, b"\xff"), "link_lost"),
        (_overwrite(40, bytes(984)), "link_lost"),
    ],
    ids=[
        "damage",
        "old sender",
        "old link",
        "shape",
        "codec",
        "huge",
        "raw",
        "no frame",
        "version",
        "truncated header",
    ],
)
async def test_a_bad_frame_is_a_nack_and_the_next_transfer_lands(spoil: Spoil, reason: str) -> None:
    duo, links = _gloo_duo()
    async with duo:
        await _land(duo, "before")
        num_writes = len(duo.target.writes)
        links.spoil = spoil
        transfer_id, _, target = await duo.begin("bad", num_tokens=9)
        duo.sender.push(transfer_id, LAYERS, range(9))
        duo.sender.commit(transfer_id, 1)
        assert await duo.landed.outcome(transfer_id) == reason
        assert await duo.sent.outcome(transfer_id) == reason
        assert target.isnan().all()
        assert len(duo.target.writes) == num_writes
        refused = [sample for metric in duo.receiver_metrics.frames_refused.collect() for sample in metric.samples]
        assert sum(sample.value for sample in refused if sample.name.endswith("_total")) >= 1
        assert duo.receiver_metrics.failures.labels("receiver", reason)._value.get() == 1
        links.spoil = None
        await _land(duo, "after")


def _of_another_codec_version(message: memoryview) -> None:
    header = decode_header(message[:HEADER_BYTES], len(message) - HEADER_BYTES)
    _reseal(codec_params=bytes((99,)) + header.codec_params[1:])(message)


def _first_section_cut(message: memoryview) -> None:
    lengths = list(decode_header(message[:HEADER_BYTES], len(message) - HEADER_BYTES).section_bytes)
    longest = lengths.index(max(lengths))
    lengths[longest] -= 1
    _reseal(section_bytes=tuple(lengths))(message)


@pytest.mark.parametrize("spoil", [_of_another_codec_version, _first_section_cut], ids=["parameters", "sections"])
@pytest.mark.parametrize("carrier", ["shm", "tcp"])
@pytest.mark.parametrize("profile", ["lossless", "fp8", "x6"])
async def test_a_coded_frame_that_lies_is_refused_and_counted_over_every_link(
    profile: str, carrier: str, spoil: Spoil
) -> None:
    config = CONFIG.model_copy(update={"backend": carrier})
    links = SpoilingLinks(open_links(config))
    async with Duo(
        config, links=(links, open_links(config)), chooser=FixedChooser(open_encoder(ladder()[profile]))
    ) as duo:
        links.spoil = spoil
        transfer_id, _, target = await duo.begin("bad", num_tokens=9)
        duo.sender.push(transfer_id, LAYERS, range(9))
        duo.sender.commit(transfer_id, 1)
        reason = await duo.landed.outcome(transfer_id)
        assert reason in ("codec", "length")
        assert await duo.sent.outcome(transfer_id) == reason
        assert duo.receiver_metrics.frames_refused.labels(reason)._value.get() >= 1
        assert target.isnan().all()
        assert duo.target.writes == []
        links.spoil = None
        after, _, target = await duo.begin("after", num_tokens=9)
        duo.sender.push(after, LAYERS, range(9))
        duo.sender.commit(after, 1)
        assert (await duo.sent.outcome(after), await duo.landed.outcome(after)) == ("acked", "landed")
        assert not target.isnan().any()


async def test_a_link_that_breaks_is_rebuilt_under_a_new_epoch() -> None:
    duo, links = _gloo_duo()
    async with duo:
        await _land(duo, "first")
        transfer_id, _, _ = await duo.begin("second", num_tokens=40)
        duo.target.is_entered.clear()
        duo.sender.push(transfer_id, LAYERS, range(16))
        assert await asyncio.to_thread(duo.target.is_entered.wait, PATIENCE_S)
        links.send_ends[0].abort()
        duo.sender.push(transfer_id, LAYERS, range(16, 40))
        duo.sender.commit(transfer_id, 1)
        assert await duo.landed.outcome(transfer_id) == "link_lost"
        assert await duo.sent.outcome(transfer_id) == "link_lost"
        await _land(duo, "third")
        epochs = [m.link_opened.link_epoch for m in duo.dialer.streams[0].heard if m.HasField("link_opened")]
        assert epochs == [1, 2]


async def test_a_receiver_that_is_stuck_times_out_and_holds_up_nobody_else() -> None:
    config = CONFIG.model_copy(update={"send_timeout_s": 1.0, "num_slots": 2, "credit_bytes": 4096})
    duo, _ = _gloo_duo(config)
    other, _ = _gloo_duo(config, "decode-2")
    async with other, duo:
        stuck = threading.Event()
        duo.target.blocked_by = stuck
        transfer_id, _, _ = await duo.begin("stuck", num_tokens=200)
        duo.sender.push(transfer_id, LAYERS, range(200))
        assert await asyncio.to_thread(duo.target.is_entered.wait, PATIENCE_S)
        # The same sender serves another decode worker meanwhile.
        duo.dialer.receiver = other.receiver
        request_id, second = RequestId("free"), TransferId("free/0")
        kv, target = duo.source.fill(request_id, 9), other.target.clear(request_id, 9)
        await other.receiver.expect(second, request_id, 0, 9)
        await duo.sender.offer(second, request_id, 9, other.peer)
        duo.sender.push(second, LAYERS, range(9))
        duo.sender.commit(second, 1)
        assert await duo.sent.outcome(second) == "acked"
        assert torch.equal(kv, target)
        assert await duo.sent.outcome(transfer_id) == "link_lost"
        stuck.set()
        assert await duo.landed.outcome(transfer_id) == "link_lost"


async def test_carriers_that_differ_are_told_apart() -> None:
    config = CONFIG.model_copy(update={"open_timeout_s": 0.5})
    duo = Duo(config)
    async with duo:
        gloo = Duo(config, links=(ProcessGroupLinks("gloo", "127.0.0.1"), ProcessGroupLinks("gloo", "127.0.0.1")))
        async with gloo:
            duo.sender._dialer = WatchedDialer(gloo.receiver)
            transfer_id, request_id = TransferId("a"), RequestId("a")
            duo.source.fill(request_id, 9)
            gloo.target.clear(request_id, 9)
            await gloo.receiver.expect(transfer_id, request_id, 0, 9)
            await duo.sender.offer(transfer_id, request_id, 9, duo.peer)
            duo.sender.push(transfer_id, LAYERS, range(9))
            assert await duo.sent.outcome(transfer_id) == "link_lost"
            assert "gloo" in duo.sent.told[transfer_id][0][1]
            await gloo.receiver.cancel(transfer_id, "gone")
            await duo.sender.close()
