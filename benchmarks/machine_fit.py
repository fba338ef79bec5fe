"""Fits the simulator's latency model to our own engine on this machine: `tandem bench --simulate --machine FILE.json`.

Times single steps of the engine on a small model: prompts of several lengths, with and without a cached prefix, and
decode steps of several batches and contexts, the fastest of some repetitions each (other work only adds).
Writes the coefficients with their relative error. The link is not measured here: its two figures are arguments.

Run ``python -m benchmarks.machine_fit --help``.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.engine_models import MODELS, BenchModel
from simulator.fit import fit_decode, fit_prefill, relative_error
from simulator.latency import DecodeLatency

if TYPE_CHECKING:
    from engine.engine import Engine

_BATCHES = (1, 2, 4, 8, 16, 32)
_REPEATS = 5
_DECODE_STEPS = 12
_KV_BYTES = 2**30


class Stopwatch:
    """Steps of one engine, timed."""

    def __init__(self, engine: "Engine", model: BenchModel) -> None:
        self._engine = engine
        self._model = model
        self._count = 0

    def prompt_s(self, tokens: int, before: int, round_: int) -> float:
        """Return the time of one step that computes `tokens` after `before` cached ones."""
        seed = 1000 * round_ + tokens + before
        prefix = [(seed + 7 * k) % self._model.vocab_size for k in range(before)]
        if before:
            self._run([*prefix, 1], new_tokens=1)
        rest = [(seed + 11 * k + 3) % self._model.vocab_size for k in range(tokens)]
        return self._run([*prefix, *rest], new_tokens=1)[0]

    def decode_s(self, batch: int, context: int, round_: int) -> float:
        """Return the fastest of some decode steps of a whole batch."""
        for number in range(batch):
            seed = round_ * 131 + number * 17
            self._add([(seed + 13 * k) % self._model.vocab_size for k in range(context)], _DECODE_STEPS + batch)
        fastest = float("inf")
        while self._engine.has_work():
            began = time.perf_counter()
            self._engine.step()
            step = self._engine.last_step
            if step.num_decodes == batch and step.num_prompt_tokens == 0:
                fastest = min(fastest, time.perf_counter() - began)
        return fastest

    def _run(self, prompt: list[int], new_tokens: int) -> list[float]:
        self._add(prompt, new_tokens)
        seconds = []
        while self._engine.has_work():
            began = time.perf_counter()
            self._engine.step()
            seconds.append(time.perf_counter() - began)
        return seconds

    def _add(self, prompt: list[int], new_tokens: int) -> None:
        from core.ids import RequestId
        from core.request import GenerateRequest, SamplingParams

        self._count += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        self._engine.add(GenerateRequest(RequestId(f"fit-{self._count}"), tuple(prompt), sampling))


def main() -> None:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(description="Fit the simulator's machine to our own engine here.")
    parser.add_argument("--model", choices=MODELS, default="tandem-tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--link-bytes-per-s", type=float, default=1e9, help="between two workers, as measured")
    parser.add_argument("--link-message-s", type=float, default=3e-4)
    parser.add_argument("--output", type=Path, required=True, help="JSON for --machine")
    options = parser.parse_args()
    from engine.config import PROCESS_ENVIRONMENT

    os.environ.update(PROCESS_ENVIRONMENT)  # before torch is loaded
    from engine.config import EngineConfig, ModelConfig
    from engine.engine import Engine

    model = MODELS[options.model]
    config = EngineConfig(
        num_threads=options.threads, max_num_requests=64, max_batch_tokens=4096, kv_cache_bytes=_KV_BYTES
    )
    engine = Engine.load(ModelConfig(path=model.prepare(), dtype="float32"), config)
    watch = Stopwatch(engine, model)
    prefill = [
        (tokens, before, min(watch.prompt_s(tokens, before, round_) for round_ in range(_REPEATS)))
        for tokens, before in _prompts(model.max_model_len)
    ]
    contexts = (16, model.max_model_len // 4)
    decode = [
        (batch, batch * context, min(watch.decode_s(batch, context, round_) for round_ in range(2)))
        for batch in _BATCHES
        for context in contexts
    ]
    prefill_fit, decode_fit = fit_prefill(prefill), fit_decode(decode)
    steps = DecodeLatency(decode_fit)
    layout = engine.layout
    found = {
        "name": f"{model.name}-here",
        "prefill": [prefill_fit.base_s, prefill_fit.per_token_s, prefill_fit.per_pair_s],
        "decode": [decode_fit.base_s, decode_fit.per_request_s, decode_fit.per_context_token_s],
        "link": [options.link_message_s, options.link_bytes_per_s, layout.num_layers],
        "kv_bytes_per_token": layout.bytes_per_token,
        "kv_tokens": _KV_BYTES // layout.bytes_per_token,
        "chunk_tokens": model.max_model_len,
        "max_batch": 64,
        "prefill_error": relative_error([prefill_fit.step_s([step[:2]]) for step in prefill], [s for *_, s in prefill]),
        "decode_error": relative_error([steps.step_s(*step[:2]) for step in decode], [s for *_, s in decode]),
        "threads": options.threads,
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def _prompts(max_model_len: int) -> Iterator[tuple[int, int]]:
    """Lengths (tokens to compute, tokens before) that fit the model; prefixes are whole blocks."""
    for tokens in (16, 64, 128, 256, 512, 1024, 1536):
        for before in (0, 512, 1024):
            if tokens + before + 2 < max_model_len:
                yield tokens, before


if __name__ == "__main__":
    main()
