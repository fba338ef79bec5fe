"""Fuzz the way of a frame from the wire into the pool, guided by coverage (atheris), for a bounded time.

``python -m tools.fuzz_frames --runs N --seconds S``: starts from valid frames of every codec, spoils them with right
and with wrong checksums, and stops at the first finding: an exception that is no refusal, a write that nobody reserved,
a decoder that wants memory out of proportion. Prints one JSON object; exits 1 on a finding, which is kept as a file
that ``--replay FILE`` lands again. atheris is optional: ``pip install atheris``.
"""

import argparse
import importlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random
from typing import Any

MEMORY_BYTES = 512 * 1024 * 1024  # of address space, past what the interpreter has: thousands of times a frame
_EXECUTED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERED = re.compile(r"cov: (\d+)")
# jitted code is compiled from bytecode, which must be as it was written
_NOT_INSTRUMENTED = ("kv_transfer.codecs.kernels", "kv_transfer.codecs.triton_quantise")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_frames", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions at most")
    parser.add_argument("--seconds", type=int, default=60, help="time at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="folder to keep what was found interesting; default: none is kept")
    parser.add_argument("--replay", type=Path, help="land one file, and let the traceback show")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay is not None:
        target = importlib.import_module("tools.fuzz_target")
        print(target.FrameTarget().land(options.replay.read_bytes()))
        return 0
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        print("fuzz_frames needs atheris, which is optional: pip install atheris", file=sys.stderr)
        return 2
    if options.child is not None:
        _fuzz(atheris, options)
    return _supervise(options)


def _supervise(options: argparse.Namespace) -> int:
    """Fuzz in a process of its own, because the fuzzer ends the one that it runs in, and sum up."""
    with tempfile.TemporaryDirectory(prefix="tandem-fuzz-") as scratch:
        corpus = options.corpus or Path(scratch, "corpus")
        tally = Path(scratch, "tally.json")
        command = [sys.executable, "-m", "tools.fuzz_frames", "--child", scratch, "--corpus", str(corpus)]
        command += ["--runs", str(options.runs), "--seconds", str(options.seconds), "--seed", str(options.seed)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        executed = _EXECUTED.search(done.stderr)
        covered = _COVERED.findall(done.stderr)
        findings = []
        for path in sorted(Path(scratch).glob("finding-*")):
            kept = Path.cwd() / path.name
            kept.write_bytes(path.read_bytes())
            findings.append(str(kept))
        summary = {
            "benchmark": "fuzz_frames",
            "passed": done.returncode == 0,
            "executions": int(executed.group(1)) if executed else 0,
            "coverage_points": int(covered[-1]) if covered else 0,
            "outcomes": json.loads(tally.read_text()) if tally.exists() else {},
            "findings": findings,
        }
    print(json.dumps(summary))
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
    return 1 if done.returncode else 0


def _fuzz(atheris: Any, options: argparse.Namespace) -> None:
    """Run the fuzzer. Does not return."""
    with atheris.instrument_imports(
        include=["kv_transfer"], exclude=list(_NOT_INSTRUMENTED), enable_loader_override=False
    ):
        target_module = importlib.import_module("tools.fuzz_target")
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    target = target_module.FrameTarget()
    frames = target_module.valid_frames()
    options.corpus.mkdir(parents=True, exist_ok=True)
    for index, (name, message) in enumerate(frames.items()):
        if target.land(message) != "landed":
            raise SystemExit(f"a valid frame does not land: {name}")
        (options.corpus / f"seed-{index:02d}").write_bytes(message)
    warnings.simplefilter("error")  # numbers that wrap around are findings too
    _limit_memory()
    outcomes: dict[str, int] = {}
    tally = options.child / "tally.json"

    def land(message: bytes) -> None:
        outcome = target.land(message)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if sum(outcomes.values()) % 500 == 0:
            tally.write_text(json.dumps(outcomes))

    def mutate(message: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < 0.6:
            return bytes(target_module.spoil(message, rng)[:max_size])
        mutated = bytearray(atheris.Mutate(message, max_size))
        if rng.random() < 0.8:
            target_module.reseal(mutated)
        return bytes(mutated)

    arguments = [
        sys.argv[0],
        str(options.corpus),
        f"-runs={options.runs}",
        f"-max_total_time={options.seconds}",
        f"-seed={options.seed}",
        f"-max_len={target_module.SLOT_BYTES}",
        f"-artifact_prefix={options.child}/finding-",
        "-timeout=10",
        "-print_final_stats=1",
    ]
    atheris.Setup(arguments, land, custom_mutator=mutate)
    atheris.Fuzz()


def _limit_memory() -> None:
    """Let whoever allocates out of proportion fail at once, instead of the machine later."""
    status = Path("/proc/self/status").read_text()
    used = int(status.split("VmSize:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
