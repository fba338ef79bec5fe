"""Codecs for the KV transfer tests: they flip bits, and stop, fail or lie where a test tells them to."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.ids import TransferId
from kv_transfer.choice import Choice, TransferObservation, TransferQuestion
from kv_transfer.codec import RAW, Decoder, Encoded, Encoder, FramePlace
from tests.kv_peers import PATIENCE_S


class Stops:
    """Where one side's codec threads are held, by the first token of the frame."""

    def __init__(self) -> None:
        self.entered: dict[int, threading.Event] = defaultdict(threading.Event)
        self.left: dict[int, threading.Event] = defaultdict(threading.Event)
        self._closed: dict[int, threading.Event] = {}

    def hold(self, *starts: int) -> None:
        for start in starts:
            self._closed[start] = threading.Event()

    def release(self, *starts: int) -> None:
        for start in starts or list(self._closed):
            self._closed[start].set()

    def pass_through(self, start: int) -> None:
        self.entered[start].set()
        if start in self._closed:
            assert self._closed[start].wait(PATIENCE_S), "a test held a codec thread for ever"
        self.left[start].set()


@dataclass
class FlippingEncoder:
    """Every bit of the tensor, flipped. `first token` travels in the parameters."""

    codec_id: int = 250
    is_identity: bool = False
    is_lossless: bool = True
    stops: Stops = field(default_factory=Stops)
    fails_at: int | None = None
    bound: float = 1.0  # promised payload per byte of KV

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return int(raw_bytes * self.bound)

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        start = place.box.tokens.start
        self.stops.pass_through(start)
        if start == self.fails_at:
            raise ValueError("this encoder fails here")
        data = kv.reshape(-1).view(torch.uint8)
        torch.bitwise_not(data, out=payload[: data.numel()])
        return Encoded(start.to_bytes(4, "little"), (data.numel(),))


@dataclass
class FlippingDecoder:
    codec_id: int = 250
    name: str = "flipping"
    is_lossy: bool = False
    stops: Stops = field(default_factory=Stops)
    error: Exception | None = None

    def is_exact(self, params: bytes) -> bool:
        return not self.is_lossy

    def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.stops.pass_through(int.from_bytes(params, "little"))
        if self.error is not None:
            raise self.error
        return torch.bitwise_not(sections[0]).view(dtype).view(*shape)


@dataclass
class FixedChooser:
    """One encoder for every transfer; remembers what it was asked and told."""

    encoder: Encoder
    profile: str = "flip"
    asked: list[TransferQuestion] = field(default_factory=list)
    observed: dict[TransferId, list[TransferObservation]] = field(default_factory=dict)

    def choose(self, question: TransferQuestion) -> Choice:
        self.asked.append(question)
        return Choice(self.profile, self.encoder, None, "test")

    def observe(self, observation: TransferObservation) -> None:
        self.observed.setdefault(observation.transfer_id, []).append(observation)


def decoders_with(decoder: Decoder) -> dict[int, Decoder]:
    return {RAW.codec_id: RAW, decoder.codec_id: decoder}
