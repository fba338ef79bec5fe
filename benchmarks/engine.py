"""Engine throughput against its peers, side by side in one run: same model files, dtype and threads.

Prints one line of JSON per result: the median tokens/s of every side over interleaved repetitions, and the ratio of
ours to the best peer (and the ratio of the fastest runs, which other work on the machine disturbs less). A batch cell
generates 64 tokens from prompts of 16 (prompt time included), greedily, end of sequence ignored; the prefill cell is
one prompt of 2,048 tokens (or what the model's context leaves beside one new token). Peers: transformers `generate`
and its continuous batching; with --with-vllm also vLLM's CPU build, in an environment that is made for it in build/ on
first use. A peer that cannot run is skipped with its reason.
"""

import argparse
import json
import math
import os
import platform
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.engine_models import MODELS, BenchModel
from benchmarks.engine_side import SIDES, SideConfig, describe
from benchmarks.engine_vllm_venv import PeerUnavailable, make_venv, vllm_python

START_TIMEOUT_S = 600.0  # vLLM compiles
SIDE_SCRIPT = Path(__file__).with_name("engine_side.py")


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of work. `counts` what is divided by the seconds: generated or prompt tokens."""

    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    counts: str

    def tokens(self) -> int:
        return self.batch * (self.new_tokens if self.counts == "generated" else self.prompt_tokens)


CELLS = (
    Cell("decode_batch_1", 1, 16, 64, "generated"),
    Cell("decode_batch_16", 16, 16, 64, "generated"),
    Cell("decode_batch_32", 32, 16, 64, "generated"),
    Cell("prefill_2048", 1, 2048, 1, "prompt"),
)


class Side:
    """A side's process."""

    def __init__(self, config: SideConfig, python: Path) -> None:
        # -P: this folder has an engine.py, which would hide the package. vLLM shall not see our packages at all.
        path = {} if config.side == "vllm" else {"PYTHONPATH": str(SIDE_SCRIPT.parent.parent)}
        threads = str(config.threads)
        self.name = config.side
        self._process = subprocess.Popen(
            [str(python), "-P", str(SIDE_SCRIPT), describe(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("BENCH_STDERR") else None,
            text=True,
            env={**os.environ, **path, "OMP_NUM_THREADS": threads},
        )
        self.version = str(self._answer(START_TIMEOUT_S)["ready"])

    def seconds(self, prompts: list[list[int]], cell: Cell, timeout_s: float) -> float:
        """Do one piece of work.

        Raises:
            PeerUnavailable: the side failed or produced another number of tokens than asked for.
        """
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "new_tokens": cell.new_tokens}), file=self._process.stdin, flush=True)
        answer = self._answer(timeout_s)
        if answer["tokens"] != cell.batch * cell.new_tokens:
            raise PeerUnavailable(f"generated {answer['tokens']} tokens instead of {cell.batch * cell.new_tokens}")
        return float(str(answer["seconds"]))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, object]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            problem = "its process ended" if readable else f"no answer within {timeout_s:.0f} s"
            self._process.kill()
            raise PeerUnavailable(problem)
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise PeerUnavailable(str(answer["error"]))
        return answer


def compare(
    model: BenchModel,
    config: SideConfig,
    pythons: dict[str, Path],
    skipped: dict[str, str],
    options: argparse.Namespace,
) -> None:
    """Run every cell of one model on every side; print a line per cell."""
    sides: list[Side] = []
    generator = random.Random(0)
    skipped = dict(skipped)
    try:
        for name, python in pythons.items():
            try:
                sides.append(Side(replace(config, side=name), python))
            except PeerUnavailable as error:
                skipped[name] = str(error)
        for cell in CELLS:
            if cell.name not in options.cells:
                continue
            cell = replace(cell, prompt_tokens=min(cell.prompt_tokens, config.max_model_len - cell.new_tokens))
            runs: dict[str, list[float]] = {side.name: [] for side in sides}
            for repetition in range(-1, options.repetitions):  # -1 warms up
                for side in list(sides):
                    prompts = [
                        [generator.randrange(3, model.vocab_size) for _ in range(cell.prompt_tokens)]
                        for _ in range(cell.batch)
                    ]
                    try:
                        seconds = side.seconds(prompts, cell, options.timeout_s)
                    except PeerUnavailable as error:
                        skipped[side.name] = str(error)
                        sides.remove(side)
                        side.close()
                        del runs[side.name]
                        continue
                    if repetition >= 0:
                        runs[side.name].append(cell.tokens() / seconds)
            print(json.dumps(_result(model, config, cell, runs, sides, skipped)), flush=True)
    finally:
        for side in sides:
            side.close()


def _result(
    model: BenchModel,
    config: SideConfig,
    cell: Cell,
    runs: dict[str, list[float]],
    sides: Sequence[Side],
    skipped: dict[str, str],
) -> dict[str, object]:
    medians = {name: statistics.median(values) for name, values in runs.items()}
    peers = {name: value for name, value in medians.items() if name != "tandem"}
    best = max(peers, key=lambda name: peers[name], default=None)
    is_compared = best is not None and "tandem" in medians
    fastest = {name: max(values) for name, values in runs.items()}
    best_of_peers = max((value for name, value in fastest.items() if name != "tandem"), default=math.nan)
    return {
        "benchmark": "engine",
        "model": model.name,
        "dtype": config.dtype,
        "threads": config.threads,
        "cell": cell.name,
        "batch": cell.batch,
        "prompt_tokens": cell.prompt_tokens,
        "new_tokens": cell.new_tokens,
        "unit": f"{cell.counts} tokens/s",
        "median": {name: round(value, 1) for name, value in medians.items()},
        "runs": {name: [round(value, 1) for value in values] for name, values in runs.items()},
        "versions": {side.name: side.version for side in sides},
        "skipped": skipped,
        "best_peer": best,
        "ratio": round(medians["tandem"] / peers[str(best)], 3) if is_compared else None,
        # Other work on the machine only ever slows a run down, so the fastest runs say more when it is not idle.
        "ratio_of_fastest_runs": round(fastest["tandem"] / best_of_peers, 3) if is_compared else None,
        "load_after": round(os.getloadavg()[0], 2),
    }


def _machine() -> dict[str, object]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=SIDE_SCRIPT.parent
    ).stdout.strip()
    return {
        "benchmark": "engine",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS], default=[c.name for c in CELLS])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="vllm also needs --with-vllm")
    parser.add_argument("--with-vllm", action="store_true", help="make vLLM's environment in build/ if it is missing")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=3, help="timed repetitions per cell, after one warm-up")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--timeout-s", type=float, default=180.0, help="longest single repetition of a side")
    options = parser.parse_args()

    pythons = {name: Path(sys.executable) for name in options.sides if name != "vllm"}
    skipped: dict[str, str] = {}
    if "vllm" in options.sides:
        try:
            pythons["vllm"] = make_venv() if options.with_vllm else vllm_python()
        except PeerUnavailable as error:
            skipped["vllm"] = str(error)
    print(json.dumps(_machine()), flush=True)
    for name in options.models:
        model = MODELS[name]
        config = SideConfig(
            side="",
            model=str(model.prepare()),
            dtype=options.dtype,
            threads=options.threads,
            max_model_len=model.max_model_len,
            max_requests=max(cell.batch for cell in CELLS),
            batch_tokens=2048,
        )
        compare(model, config, pythons, skipped, options)


if __name__ == "__main__":
    main()
