"""Each rung of a profile library against plain quantisers at equal bytes, on the model that the library is for.

    python -m benchmarks.kv_ladder                                       # tandem-tiny: a minute
    python -m benchmarks.kv_ladder --model models/tiny --model build/qwen2 --page docs/kv_profiles.md

Token agreement and divergence of next-token logits under KV injection (`profile_search.judge`), on the acceptance
prompts, with 95 % intervals by a bootstrap over prompts; what is compared is compared prompt by prompt. One JSON line
per rung. `--page` writes the Markdown page, so that no number on it was ever typed. Not a timing but for the last two
columns, and so not disturbed by a busy machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.kv_baselines import BASELINES, Baseline, levels_for, levels_of_prompt
from benchmarks.kv_ladder_page import page_of
from core.errors import ConfigError
from engine.injection import InjectionHarness
from kv_transfer.machine import machine_fingerprint
from kv_transfer.profile import LIBRARY_NAME, Profile, load_library
from profile_search.cost import frame_seconds
from profile_search.judge import InjectionJudge
from profile_search.prompts import PROMPTS_NAME, load_prompts
from profile_search.scores import PromptScore, quality_of, ratio_of, score_prompt

LEVEL_PROMPTS = 9
FRAME_TOKENS = 512
_TINY = Path("models/tiny")


@dataclass(frozen=True, slots=True)
class Bench:
    """One loaded model with its acceptance prompts."""

    harness: InjectionHarness
    judge: InjectionJudge

    @classmethod
    def load(cls, model: Path, prompts: Path) -> "Bench":
        harness = InjectionHarness.load(model)
        return cls(harness, InjectionJudge(harness, load_prompts(model, prompts).acceptance))

    def rung(self, profile: Profile) -> list[PromptScore]:
        return [self.judge.score(profile.pipeline, at) for at in range(self.judge.num_prompts)]

    def baseline(self, baseline: Baseline, ratio: float) -> list[PromptScore] | None:
        """Return its scores at the rung's ratio, or None when it cannot be that small."""
        references = self.judge.references
        levels = levels_for(baseline, [reference.kv for reference in references[:LEVEL_PROMPTS]], ratio)
        if levels is None:
            return None
        scores = []
        for at, reference in enumerate(references):
            kv, num_bytes = baseline.code(reference.kv, levels_of_prompt(levels, at))
            raw_bytes = reference.kv.numel() * reference.kv.element_size()
            logits = self.harness.inject(reference, kv)
            scores.append(score_prompt(reference.logits, logits, raw_bytes, round(num_bytes)))
        return scores

    def speeds(self, profile: Profile) -> tuple[float, float]:
        """Return encode and decode, GB/s of raw bytes, of one frame on one core."""
        kv = max((reference.kv for reference in self.judge.references), key=lambda kv: kv.shape[3])
        frame = kv[:, :, :, :FRAME_TOKENS].contiguous()
        raw_bytes = frame.numel() * frame.element_size()
        encode_s, decode_s = frame_seconds(profile.pipeline, frame)
        return raw_bytes / encode_s / 1e9, raw_bytes / decode_s / 1e9


def difference(ours: Sequence[PromptScore], theirs: Sequence[PromptScore]) -> dict[str, list[float]]:
    """Return the 95 % intervals of ours minus theirs, of agreement and of divergence, by a bootstrap over prompts."""
    table = np.array(
        [
            (a.num_agreed - b.num_agreed, a.kl_sum - b.kl_sum, a.num_positions)
            for a, b in zip(ours, theirs, strict=True)
        ],
        dtype=np.float64,
    )
    drawn = np.random.default_rng(7).integers(0, len(table), (2000, len(table)))
    sums = table[drawn].sum(axis=1)
    return {
        name: np.quantile(sums[:, column] / sums[:, 2], [0.025, 0.975]).round(6).tolist()
        for column, name in enumerate(("agreement", "kl"))
    }


def row_of(scores: Sequence[PromptScore]) -> dict[str, object]:
    quality = quality_of(scores)
    rounded = {key: round(value, 6) for key, value in quality.model_dump().items()}
    return {"ratio": round(ratio_of(scores), 3), **rounded}


def measure(model: Path, prompts: Path, rows: list[dict[str, object]]) -> None:
    """Append one row per rung of the model's library, printing each."""
    try:
        library = load_library(model / LIBRARY_NAME)
        bench = Bench.load(model, prompts)
        profiles = library.validated(bench.harness.info.kv_layout(16))
    except ConfigError as error:
        print(f"{model}: skipped: {error}", file=sys.stderr)
        return
    for profile in profiles:
        if profile.pipeline.kind == "none":
            continue
        scores = bench.rung(profile)
        encode, decode = bench.speeds(profile)
        row: dict[str, object] = {
            "benchmark": "kv.ladder",
            "model": library.model,
            "family": _family(model),
            "machine": machine_fingerprint(),
            "rung": profile.name,
            "is_lossless": profile.is_lossless,
            **row_of(scores),
            "encode_gb_s": round(encode, 3),
            "decode_gb_s": round(decode, 3),
            "baselines": {},
        }
        if not profile.is_lossless:
            row["baselines"] = {
                baseline.name: None
                if (theirs := bench.baseline(baseline, ratio_of(scores))) is None
                else {**row_of(theirs), "difference": difference(scores, theirs)}
                for baseline in BASELINES
            }
        rows.append(row)
        print(json.dumps(row), flush=True)


def _family(model: Path) -> str:
    return str(json.loads((model / "config.json").read_text())["model_type"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="checkpoint with kv_profiles.yaml; may be repeated")
    parser.add_argument("--prompts", type=Path, default=_TINY / PROMPTS_NAME)
    parser.add_argument("--page", type=Path, help="Markdown page to write")
    parser.add_argument("--results", type=Path, help="file for the JSON lines, rewritten")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows: list[dict[str, object]] = []
    for model in args.model or [_TINY]:
        measure(model, args.prompts, rows)
    if args.results is not None:
        args.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.page is not None:
        args.page.write_text(page_of(rows))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
