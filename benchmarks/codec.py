"""How fast the codecs are on one core, how small the KV becomes, and where the time goes.

One line of JSON per result, all sides in one run. Bytes are those of the tensor before coding, so the figures compare
with links; seconds are CPU seconds of the thread that codes (other work on the machine disturbs them less than wall
seconds, which are given too), the best of the repetitions. KV is tandem-tiny's for prose of the standard library.

- `rung`: encode and decode, ratio with all metadata and the frame header, share of encoding and decoding time spent in
  the arithmetic, in zstd and in the rest.
- `stage`: what each stage of the 8-level rung costs, by leaving it out; share of the whole.
- `naive`: the same 8 levels written in a few lines of torch, without packing: what there was to beat.
- `threads`: two threads at once, against one: what the GIL leaves of the second core.

Run ``python -m benchmarks.codec --help``.
"""

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from pydoc import plain, render_doc
from unittest.mock import patch

import torch
import zstandard
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kv_transfer.box import Box
from kv_transfer.codec import Decoder, Encoded, Encoder, FramePlace, default_decoders
from kv_transfer.codecs import fused, lossless, quantised
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.frame import HEADER_BYTES, section_spans

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny"
EIGHT = PipelineSpec(k=Quantiser(levels=8), v=Quantiser(levels=8))
ROTATED = EIGHT.model_copy(update={"rope_theta": 10_000.0, "rotate_v": True, "center_v": True})
MODULES = ("argparse", "subprocess", "threading", "tarfile", "unittest.mock", "email.message")


@dataclass(slots=True)
class Timing:
    """Best and median over repetitions, and the best repetition's seconds by part."""

    cpu_s: float = float("inf")
    wall_s: list[float] = field(default_factory=list)
    parts_s: Mapping[str, float] = field(default_factory=dict)


class Clocks:
    """Seconds by part of the work, while `installed`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        with (
            self._around(fused, "encode_half", "arithmetic"),
            self._around(fused, "decode_half", "arithmetic"),
            self._around(quantised, "squeeze", "zstd"),
            self._around(quantised, "expand", "zstd"),
            self._around(lossless, "squeeze", "zstd"),
            self._around(lossless, "expand", "zstd"),
        ):
            yield

    @contextmanager
    def _around(self, module: object, name: str, part: str) -> Iterator[None]:
        inner: Callable[..., object] = getattr(module, name)

        def timed(*args: object) -> object:
            start = time.thread_time()
            try:
                return inner(*args)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.thread_time() - start

        with patch.object(module, name, timed):
            yield


def real_kv(num_tokens: int) -> Tensor:
    """Return tandem-tiny's KV of one prompt, ``[L, 2, K, T, D]``."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    text = "\n".join(plain(render_doc(name)) for name in MODULES)
    ids = tokenizer(text)["input_ids"]
    pieces = []
    context = min(num_tokens, model.config.max_position_embeddings)
    with torch.no_grad():
        for start in range(0, num_tokens, context):
            cache = DynamicCache()
            model(torch.tensor([ids[start : start + context]]), past_key_values=cache, logits_to_keep=1)
            pieces.append(torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]))
    return torch.cat(pieces, dim=3)[:, :, :, :num_tokens].contiguous()


class Codec:
    """One spec on one tensor."""

    def __init__(self, spec: PipelineSpec, kv: Tensor) -> None:
        layers, _, heads, tokens, _ = kv.shape
        self.raw_bytes = kv.numel() * kv.element_size()
        self._kv = kv
        self._encoder: Encoder = open_encoder(spec)
        self._decoder: Decoder = default_decoders()[self._encoder.codec_id]
        self._place = FramePlace(Box(range(layers), range(heads), range(tokens)), tokens, layers, heads)
        self._payload = torch.empty(self._encoder.max_payload_bytes(self.raw_bytes), dtype=torch.uint8)
        self._encoded = self.encode()

    def encode(self) -> Encoded:
        return self._encoder.encode(self._kv, self._payload, self._place)

    def decode(self) -> Tensor:
        spans = section_spans(self._encoded.section_bytes)
        sections = [self._payload[span.start : span.stop] for span in spans]
        return self._decoder.decode(self._encoded.params, sections, self._kv.shape, self._kv.dtype)

    @property
    def ratio(self) -> float:
        return self.raw_bytes / (section_spans(self._encoded.section_bytes)[-1].stop + HEADER_BYTES)


class Naive:
    """8 levels per token, K centred and rotated by a matrix product: torch, one operation after the other."""

    def __init__(self, kv: Tensor) -> None:
        self._kv = kv
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < kv.shape[-1]:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        self._matrix = matrix / kv.shape[-1] ** 0.5
        self._coded = self.encode()

    def encode(self) -> tuple[Tensor, Tensor, Tensor, bytes]:
        x = self._kv.float()
        mean = x[:, 0].mean(2, keepdim=True)
        x[:, 0] = (x[:, 0] - mean) @ self._matrix
        low = x.amin(-1, keepdim=True)
        step = (x.amax(-1, keepdim=True) - low) / 7
        codes = ((x - low) / step).round().to(torch.uint8)
        return mean, low, step, zstandard.ZstdCompressor(level=1).compress(codes.numpy().data)

    def decode(self) -> Tensor:
        mean, low, step, squeezed = self._coded
        codes = torch.frombuffer(bytearray(zstandard.ZstdDecompressor().decompress(squeezed)), dtype=torch.uint8)
        x = codes.view(self._kv.shape).float() * step + low
        x[:, 0] = x[:, 0] @ self._matrix + mean
        return x.to(self._kv.dtype)


def timed(work: Callable[[], object], repeat: int, clocks: Clocks | None = None) -> Timing:
    """Return the timing of `repeat` runs after one that is not counted."""
    work()
    found = Timing()
    for _ in range(repeat):
        if clocks is not None:
            clocks.seconds = {}
        wall, cpu = time.perf_counter(), time.thread_time()
        work()
        cpu = time.thread_time() - cpu
        found.wall_s.append(time.perf_counter() - wall)
        if cpu < found.cpu_s:
            found.cpu_s = cpu
            found.parts_s = dict(clocks.seconds) if clocks else {}
    return found


def gb_per_s(raw_bytes: int, seconds: float) -> float:
    return round(raw_bytes / seconds / 1e9, 3)


def shares(timing: Timing) -> dict[str, float]:
    """Return the part of the time that each part took, and what is left."""
    found = {part: round(seconds / timing.cpu_s, 3) for part, seconds in timing.parts_s.items()}
    return {**found, "rest": round(max(0.0, 1.0 - sum(found.values())), 3)}


def rung_line(name: str, spec: PipelineSpec, kv: Tensor, repeat: int) -> dict[str, object]:
    codec, clocks = Codec(spec, kv), Clocks()
    with clocks.installed():
        encode = timed(codec.encode, repeat, clocks)
        decode = timed(codec.decode, repeat, clocks)
    return {
        "result": "rung",
        "name": name,
        "ratio": round(codec.ratio, 3),
        "encode_gb_s": gb_per_s(codec.raw_bytes, encode.cpu_s),
        "decode_gb_s": gb_per_s(codec.raw_bytes, decode.cpu_s),
        "encode_wall_gb_s": gb_per_s(codec.raw_bytes, statistics.median(encode.wall_s)),
        "decode_wall_gb_s": gb_per_s(codec.raw_bytes, statistics.median(decode.wall_s)),
        "encode_share": shares(encode),
        "decode_share": shares(decode),
    }


def stage_lines(kv: Tensor, repeat: int) -> Iterator[dict[str, object]]:
    """Yield what the stages of the rotated 8-level rung cost, in nanoseconds per value."""

    def both(changes: Mapping[str, object]) -> tuple[float, float]:
        codec = Codec(ROTATED.model_copy(update=dict(changes)), kv)
        return timed(codec.encode, repeat).cpu_s, timed(codec.decode, repeat).cpu_s

    plain_symbols: dict[str, object] = {"entropy": "none"}  # what zstd costs depends on the other stages
    full, unsqueezed = both({}), both(plain_symbols)
    left_out: dict[str, dict[str, object]] = {
        "rotary": {"rope_theta": None},
        "mean": {"center_k": False, "center_v": False},
        "hadamard": {"rotate_k": False, "rotate_v": False},
        "zstd": {},
    }
    for stage, changes in left_out.items():
        before = unsqueezed if changes else full
        without = both({**changes, **plain_symbols}) if changes else unsqueezed
        costs = [(a - b) / kv.numel() * 1e9 for a, b in zip(before, without, strict=True)]
        of_all = [(a - b) / c for a, b, c in zip(before, without, full, strict=True)]
        yield {
            "result": "stage",
            "name": stage,
            "encode_ns_per_value": round(costs[0], 3),
            "decode_ns_per_value": round(costs[1], 3),
            "encode_share": round(of_all[0], 3),
            "decode_share": round(of_all[1], 3),
        }


def naive_line(kv: Tensor, repeat: int) -> dict[str, object]:
    naive = Naive(kv)
    raw_bytes = kv.numel() * kv.element_size()
    return {
        "result": "naive",
        "name": "torch",
        "encode_gb_s": gb_per_s(raw_bytes, timed(naive.encode, repeat).cpu_s),
        "decode_gb_s": gb_per_s(raw_bytes, timed(naive.decode, repeat).cpu_s),
    }


def threads_line(kv: Tensor, repeat: int) -> dict[str, object]:
    """Wall time of as much work for each thread: 2.0 is two whole cores."""

    def seconds(count: int) -> float:
        codecs = [Codec(EIGHT, kv) for _ in range(count)]
        start = threading.Barrier(count + 1)

        def work(codec: Codec) -> None:
            start.wait()
            for _ in range(2 * repeat):
                codec.encode()
                codec.decode()

        threads = [threading.Thread(target=work, args=(codec,)) for codec in codecs]
        for thread in threads:
            thread.start()
        start.wait()
        begun = time.perf_counter()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begun

    one, two = seconds(1), seconds(2)
    return {"result": "threads", "name": "2 against 1", "speedup": round(2 * one / two, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="of the prompt; one frame (tandem-tiny: 2 KiB each)")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--rung", action="append", help="only this one; may be given more than once")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kv = real_kv(arguments.tokens)
    rungs = {"levels8": EIGHT, "levels8_rotated": ROTATED, **ladder(10_000.0)}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    versions = {name: version(name) for name in ("torch", "numba", "zstandard")}
    print(json.dumps({"result": "setting", "shape": list(kv.shape), **machine, **versions}), flush=True)
    for name, spec in rungs.items():
        if spec.kind != "none" and (not arguments.rung or name in arguments.rung):
            print(json.dumps(rung_line(name, spec, kv, arguments.repeat)), flush=True)
    if not arguments.rung:
        for line in stage_lines(kv, arguments.repeat):
            print(json.dumps(line), flush=True)
        print(json.dumps(naive_line(kv, max(3, arguments.repeat // 5))), flush=True)
        print(json.dumps(threads_line(kv, arguments.repeat)), flush=True)


if __name__ == "__main__":
    main()
