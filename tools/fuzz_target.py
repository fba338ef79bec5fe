"""What a fuzzer of frames needs: valid frames of every codec, ways to spoil them, and a receiver to feed them to.

`FrameTarget.land` is the whole way from bytes that arrived to the pool, with decoders that may only refuse: any other
exception, a write after a refusal, a write outside of the reservation or of another shape is a `Finding`. Used by the
property tests and by `fuzz_frames`, which lets coverage guide it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from random import Random

import torch
from torch import Tensor

from core.ids import RequestId, TransferId
from core.layout import KvLayout
from kv_transfer.box import Box
from kv_transfer.codec import TORCH_DTYPES, Decoder, Encoder, FramePlace, default_decoders
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.frame import HEADER_BYTES, FrameHeader, FrameRefused, decode_header, seal
from kv_transfer.link import Slot
from kv_transfer.receiver.coverage import Coverage
from kv_transfer.receiver.landing import FrameStamp, Landing, LandingZone
from kv_transfer.session import NackReason

LAYOUT = KvLayout("fuzz", num_layers=2, num_kv_heads=2, head_dim=16, dtype="bfloat16", block_size=8)
TRANSFER, REQUEST = TransferId("fuzz/0"), RequestId("fuzz")
STAMP = FrameStamp(sender_epoch=3, receiver_epoch=7, link_epoch=1)
TARGET = Box(range(LAYOUT.num_layers), range(LAYOUT.num_kv_heads), range(4, 64))
SLOT_BYTES = HEADER_BYTES + 16384
_ODD_SPECS: Mapping[str, PipelineSpec] = {
    "groups": PipelineSpec(
        k=Quantiser(levels=7, axis="group", group_tokens=5, symmetric=False),
        v=Quantiser(levels=3, axis="channel"),
        center_v=True,
    ),
    "classes": PipelineSpec(
        sink_tokens=6,
        tail_tokens=3,
        k=Quantiser(levels=12, axis="tensor", step_rms=0.5),
        v=Quantiser(levels=256, axis="tensor", symmetric=False),
        protected_first=1,
        k_protected_levels=32,
        v_protected_levels=32,
        low_heads=((1, 1),),
        k_low_levels=2,
        v_low_levels=2,
        rotate_v=True,
    ),
    "no entropy": PipelineSpec(entropy="none", k=Quantiser(levels=5), v=Quantiser(levels=4)),
}


class Finding(Exception):
    """What must never happen, whatever arrives."""


def valid_frames() -> dict[str, bytes]:
    """Return one message of every profile and of two shapes, by name. The same bytes in every run."""
    encoders = {name: open_encoder(spec) for name, spec in {**ladder(), **_ODD_SPECS}.items()}
    boxes = {
        "all": Box(range(2), range(2), range(4, 28)),
        "one plane": Box(range(1, 2), range(1), range(33, 64)),
    }
    return {
        f"{name}, {shape}": _frame(encoder, box) for name, encoder in encoders.items() for shape, box in boxes.items()
    }


def _frame(encoder: Encoder, box: Box) -> bytes:
    shape = (len(box.layers), 2, len(box.heads), len(box.tokens), LAYOUT.head_dim)
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(TORCH_DTYPES[LAYOUT.dtype])
    message = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
    place = FramePlace(box, TARGET.tokens.stop, LAYOUT.num_layers, LAYOUT.num_kv_heads)
    encoded = encoder.encode(kv, message[HEADER_BYTES:], place)
    header = FrameHeader(
        transfer_id=TRANSFER,
        sender_epoch=STAMP.sender_epoch,
        receiver_epoch=STAMP.receiver_epoch,
        link_epoch=STAMP.link_epoch,
        frame_idx=0,
        box=box,
        head_dim=LAYOUT.head_dim,
        dtype=LAYOUT.dtype,
        codec_id=encoder.codec_id,
        codec_params=encoded.params,
        section_bytes=encoded.section_bytes,
        raw_bytes=kv.numel() * kv.element_size(),
    )
    num_bytes = seal(header, Slot(0, message).view())
    return message[:num_bytes].numpy().tobytes()


class FrameTarget:
    """A receiver's landing zone over one reserved transfer, which is new for every message."""

    def __init__(self) -> None:
        self._landings: dict[TransferId, Landing] = {}
        self._writes = 0
        self._header: FrameHeader | None = None
        self._defect: Exception | None = None
        decoders = {codec_id: _Strict(decoder, self._note) for codec_id, decoder in default_decoders().items()}
        self._zone = LandingZone(STAMP, LAYOUT, self, decoders, self._landings)
        self._slot = Slot(0, torch.zeros(SLOT_BYTES, dtype=torch.uint8))

    def land(self, message: bytes) -> str:
        """Let a message arrive. Returns "landed", "late", or the reason of its refusal.

        Raises:
            Finding: the receiver did what it must not do.
        """
        held = message[:SLOT_BYTES]
        view = self._slot.view()
        view[: len(held)] = held
        view[len(held) :] = bytes(SLOT_BYTES - len(held))
        return self.land_slot(self._slot)

    def land_slot(self, slot: Slot) -> str:
        """The same for a slot that a link delivered."""
        self._landings[TRANSFER] = landing = Landing(TRANSFER, REQUEST, Coverage(TARGET))
        self._writes, self._defect = 0, None
        try:
            header, arrival = self._zone.admit(slot)
            written = None if arrival is None else self._zone.write(arrival, slot.memory[HEADER_BYTES:])
            outcome = "late" if written is None else "landed"
        except FrameRefused as refused:
            outcome = str(refused.reason)
            header = None
        if self._defect is not None:
            raise Finding(f"a decoder raised {type(self._defect).__name__}") from self._defect
        if outcome == NackReason.POOL:
            raise Finding("a frame that does not fit got as far as the pool")
        if self._writes != (outcome == "landed"):
            raise Finding(f"{self._writes} writes of a frame that was {outcome}")
        if header is not None and outcome == "landed" and landing.written.num_frames != 1:
            raise Finding("a frame that landed was not accounted for")
        return outcome

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: Tensor, heads: range | None = None
    ) -> None:
        """The pool: takes only what was reserved, in the shape that was said."""
        heads = heads or range(LAYOUT.num_kv_heads)
        self._writes += 1
        if request_id != REQUEST or not TARGET.contains(Box(layers, heads, tokens)):
            raise Finding(f"a write outside of the reservation: {request_id} {layers} {heads} {tokens}")
        if kv.shape != (len(layers), 2, len(heads), len(tokens), LAYOUT.head_dim) or kv.dtype != torch.bfloat16:
            raise Finding(f"a write of {tuple(kv.shape)} {kv.dtype}")
        kv.float().sum()  # every byte can be read

    def _note(self, error: Exception) -> None:
        self._defect = error


class _Strict:
    """A decoder whose crashes are noted, although the zone turns them into refusals."""

    def __init__(self, inner: Decoder, on_crash: Callable[[Exception], None]) -> None:
        self._inner = inner
        self._on_crash = on_crash
        self.codec_id, self.name = inner.codec_id, inner.name

    def is_exact(self, params: bytes) -> bool:
        return self._inner.is_exact(params)

    def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            return self._inner.decode(params, sections, shape, dtype)
        except FrameRefused:
            raise
        except Exception as error:
            self._on_crash(error)
            raise


def reseal(message: bytearray) -> None:
    """Make the checksum right again where the header can be read: a fuzzer would never find it."""
    try:
        header = decode_header(memoryview(message)[:HEADER_BYTES], len(message) - HEADER_BYTES)
    except FrameRefused:
        return
    seal(header, memoryview(message))


def spoil(message: bytes, rng: Random) -> bytes:
    """Return the message with one lie, checksum right: a field, a parameter, a section, or a few bytes anywhere."""
    spoiled = bytearray(message)
    try:
        header = decode_header(memoryview(spoiled)[:HEADER_BYTES], len(spoiled) - HEADER_BYTES)
    except FrameRefused:
        _flip(spoiled, range(len(spoiled)), rng)
        return bytes(spoiled)
    kind = rng.randrange(6)
    if kind == 0:
        header = dataclasses.replace(header, **_lie(header, rng))  # type: ignore[arg-type]  # values of any field
    elif kind in (1, 2):
        params = bytearray(header.codec_params)
        _flip(params, range(len(params)), rng)
        if rng.random() < 0.1:
            params = params[: rng.randrange(len(params) + 1)] + rng.randbytes(rng.randrange(4))
        header = dataclasses.replace(header, codec_params=bytes(params))
    elif header.payload_bytes:
        _flip(spoiled, range(HEADER_BYTES, HEADER_BYTES + header.payload_bytes), rng)
        if kind == 3:
            _flip(spoiled, range(HEADER_BYTES, HEADER_BYTES + min(64, header.payload_bytes)), rng)
    end = HEADER_BYTES + max(0, min(header.payload_bytes, SLOT_BYTES - HEADER_BYTES))
    spoiled.extend(bytes(max(0, end - len(spoiled))))
    seal(header, memoryview(spoiled))
    return bytes(spoiled)


def _flip(data: bytearray, where: range, rng: Random) -> None:
    for _ in range(rng.randint(1, 4) if where else 0):
        data[rng.choice(where)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def _lie(header: FrameHeader, rng: Random) -> dict[str, object]:
    box = header.box
    sections = list(header.section_bytes)
    if sections:
        idx = rng.randrange(len(sections))
        sections[idx] = max(0, sections[idx] + rng.choice((-1, 1, -sections[idx], 64, -64, 2**40)))
    odd = range(rng.randrange(4), rng.randrange(70))
    other = dataclasses.replace(box, **{rng.choice(("layers", "heads", "tokens")): odd})
    lies: tuple[dict[str, object], ...] = (
        {"section_bytes": tuple(sections)},
        {"section_bytes": header.section_bytes[:-1]},
        {"section_bytes": (*header.section_bytes, 0)[:16]},
        {"codec_id": rng.randrange(6)},
        {"box": other},
        {"box": other, "raw_bytes": 2 * other.volume * header.head_dim * 2},
        {"raw_bytes": rng.choice((0, 1, 2**63, header.raw_bytes * 2))},
        {"head_dim": rng.choice((0, 1, 8, 32, 65535))},
        {"dtype": rng.choice(("float32", "float16"))},
        {"link_epoch": rng.randrange(3)},
    )
    return rng.choice(lies)
