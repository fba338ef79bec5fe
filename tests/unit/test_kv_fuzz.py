"""Frames that lie, in numbers: whatever arrives, the receiver lands it or refuses it, and does nothing else."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_transfer import codec
from kv_transfer.box import Box
from kv_transfer.carriers.links import open_links
from kv_transfer.codec import Encoder, FramePlace, default_decoders
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES, decode_header, seal, section_spans
from kv_transfer.link import LinkPlan, ReceiveEnd, SendEnd
from kv_transfer.session import NackReason
from tests.kv_link_ends import WAIT_S, joined
from tools.fuzz_target import SLOT_BYTES, Finding, FrameTarget, reseal, spoil, valid_frames

FRAMES = valid_frames()
TARGET = FrameTarget()
OUTCOMES = {"landed", "late", *NackReason}


def test_every_profile_has_valid_frames_that_land() -> None:
    assert {TARGET.land(message) for message in FRAMES.values()} == {"landed"}
    ids = {decode_header(memoryview(message)[:HEADER_BYTES], SLOT_BYTES).codec_id for message in FRAMES.values()}
    assert ids == set(default_decoders())


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(FRAMES)), seed=st.integers(0, 2**32), rounds=st.integers(1, 4))
def test_a_frame_that_lies_with_a_right_checksum_lands_or_is_refused(name: str, seed: int, rounds: int) -> None:
    message, rng = FRAMES[name], Random(seed)
    for _ in range(rounds):
        message = spoil(message, rng)
    assert TARGET.land(message) in OUTCOMES


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(FRAMES)), data=st.data())
def test_a_frame_with_any_byte_changed_never_lands(name: str, data: st.DataObject) -> None:
    message = bytearray(FRAMES[name])
    used = int.from_bytes(message[6:8], "little")
    at = data.draw(st.one_of(st.integers(0, used - 1), st.integers(HEADER_BYTES, len(message) - 1)))
    message[at] ^= data.draw(st.integers(1, 255))
    assert TARGET.land(bytes(message)) in set(NackReason)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(FRAMES)), data=st.data(), is_resealed=st.booleans())
def test_noise_in_the_place_of_a_payload(name: str, data: st.DataObject, is_resealed: bool) -> None:
    message = bytearray(FRAMES[name])
    noise = data.draw(st.binary(min_size=1, max_size=len(message) - HEADER_BYTES))
    message[HEADER_BYTES : HEADER_BYTES + len(noise)] = noise
    if is_resealed:
        reseal(message)
    assert TARGET.land(bytes(message)) in OUTCOMES


def test_a_decoder_that_crashes_or_gives_another_shape_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(codec.RawCodec):
        def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            if params == b"crash":
                raise KeyError("a defect")
            return super().decode(params, sections, shape, dtype).transpose(2, 3)

    monkeypatch.setattr("tools.fuzz_target.default_decoders", lambda: {0: Broken()})
    target = FrameTarget()
    with pytest.raises(Finding, match="got as far as the pool"):
        target.land(FRAMES["none, all"])
    message = bytearray(FRAMES["none, all"])
    header = decode_header(memoryview(message)[:HEADER_BYTES], SLOT_BYTES)
    seal(dataclasses.replace(header, codec_params=b"crash"), memoryview(message))
    with pytest.raises(Finding, match="KeyError"):
        target.land(bytes(message))


# --- sizes that are stated and not true -------------------------------------------------------------------------------


def test_a_group_may_be_stated_longer_than_memory() -> None:
    shape = (64, 2, 64, 2, 128)  # spread over the 65535 tokens that its groups will state, it would be 137 GB
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    place = FramePlace(Box(range(64), range(64), range(2)), 2, 64, 64)

    def encode(group_tokens: int) -> tuple[Encoder, bytes, list[Tensor]]:
        quantiser = Quantiser(levels=16, axis="group", group_tokens=group_tokens)
        encoder = open_encoder(PipelineSpec(k=quantiser, v=quantiser))
        payload = torch.zeros(kv.nbytes, dtype=torch.uint8)
        encoded = encoder.encode(kv, payload, place)
        return (
            encoder,
            encoded.params,
            [payload[span.start : span.stop] for span in section_spans(encoded.section_bytes)],
        )

    encoder, params, sections = encode(2)
    other = encode(3)[1]  # with two tokens, all the difference is in the statement
    lying = bytearray(params)
    for at in (at for at in range(len(params)) if params[at] != other[at]):
        lying[at : at + 2] = b"\xff\xff"
    assert bytes(lying) != params
    decoder = default_decoders()[encoder.codec_id]
    whole = decoder.decode(bytes(lying), sections, shape, kv.dtype)
    assert torch.equal(whole, decoder.decode(params, sections, shape, kv.dtype))


# --- over links -------------------------------------------------------------------------------------------------------


@contextmanager
def _link(carrier: str) -> Iterator[tuple[SendEnd, ReceiveEnd]]:
    config = KvTransferConfig.model_validate({"backend": carrier})
    senders, receivers = open_links(config), open_links(config)
    plan = LinkPlan(f"fuzz/{carrier}", SLOT_BYTES, 2, WAIT_S)
    try:
        with joined(receivers, plan, senders=senders) as ends:
            yield ends
    finally:
        senders.close()
        receivers.close()


@pytest.mark.parametrize("carrier", ["memory", "shm", "tcp", "gloo"])
def test_frames_that_lie_cross_every_link_and_leave_it_whole(carrier: str) -> None:
    rng = Random(carrier)
    names = sorted(FRAMES)
    with _link(carrier) as (sender, receiver):
        for turn in range(60):
            message = FRAMES[rng.choice(names)]
            is_valid = turn % 3 == 0
            if not is_valid:
                message = spoil(spoil(message, rng), rng)[:SLOT_BYTES]
            slot = sender.acquire(WAIT_S)
            slot.view()[: len(message)] = message
            sender.send(slot, len(message))
            landed = receiver.receive()
            outcome = TARGET.land_slot(landed)
            receiver.release(landed)
            assert outcome == "landed" if is_valid else outcome in OUTCOMES
