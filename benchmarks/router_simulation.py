"""The real router in simulated clusters: tables on standard output, a JSON line per arm in a file.

Each question is one table; every arm sees the same traffic under the same seeds, and each value is a mean over seeds
with its 95 % interval (Student). Refused, failed and unfinished requests count as misses; in `ttft_s` with 30 s, or the
longest TTFT if that is longer. The first tenth and the last twentieth of the time are left out.

- `policies`: mean TTFT of the published policies and of the one cost on the conversation trace.
- `ablations`: the same with each term of the cost left out.
- `stale`: periodic reports against accept or reject, at 70 to 110 % of the prefill pool, on the code trace.
- `oscillation`: refusing by the decode load of now, and by the load predicted for the end of the prefill.
- `classes`: an overload of interactive, deadline and batch requests: who waits, and does everybody finish.
- `replicas`: one gateway against three.

Without a trace given, its questions are left out. Run ``python -m benchmarks.router_simulation --help``.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from pathlib import Path

from benchmarks import router_simulation_arms as arms
from benchmarks import router_simulation_classes as classes
from simulator.comparison import Measure, Row, compare, processes, serving_values
from simulator.tables import DEFAULT_COLUMNS, table

QUESTIONS = ("policies", "ablations", "stale", "oscillation", "classes", "replicas")
_QUICK_REQUESTS, _QUICK_SEEDS = 1000, 3
_FULL_SEEDS = 5


class Report:
    """Prints tables and keeps the rows."""

    def __init__(self, output: Path | None, seeds: Sequence[int], pool: Executor | None) -> None:
        self._output = output
        self._seeds = seeds
        self._pool = pool
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("")

    def answer(
        self,
        question: arms.Question,
        columns: Sequence[str] = DEFAULT_COLUMNS,
        measure: Measure = serving_values,
    ) -> list[Row]:
        """Run all arms of a question."""
        began = time.perf_counter()
        rows = []
        for row in compare(question.arms, question.workload, self._seeds, measure=measure, pool=self._pool):
            rows.append(row)
            if self._output is not None:
                with self._output.open("a") as lines:
                    lines.write(row.json_line(question=question.name, title=question.title) + "\n")
        print(f"\n## {question.name}: {question.title}; {len(self._seeds)} seeds", flush=True)
        print("\n".join(table(rows, columns)), flush=True)
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
        return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the questions that were asked."""
    options = _parser().parse_args(argv)
    with nullcontext() if options.processes == 1 else processes(options.processes) as pool:
        return _answer_all(options, pool)


def _answer_all(options: argparse.Namespace, pool: Executor | None) -> int:
    max_requests = None if options.full else options.requests
    seeds = range(options.seeds or (_FULL_SEEDS if options.full else _QUICK_SEEDS))
    report = Report(options.output, seeds, pool)
    conversation, code, speed = options.trace, options.code_trace, options.speed

    def stale() -> None:
        for question in arms.stale_reports(code, max_requests):
            report.answer(question, ("ttft_s", "ttft_p99_s", "pd_serve", "missed", "asked"), arms.stale_values)

    asked: dict[str, Callable[[], object]] = {}
    if conversation is not None:
        asked = {
            "policies": lambda: report.answer(arms.policies(conversation, max_requests, speed)),
            "ablations": lambda: report.answer(
                arms.ablations(conversation, max_requests, speed), arms.ABLATION_COLUMNS
            ),
            "oscillation": lambda: report.answer(
                classes.oscillation(conversation, None if options.full else 2 * options.requests),  # a swing takes long
                classes.OSCILLATION_COLUMNS,
                classes.oscillation_values,
            ),
            "classes": lambda: report.answer(
                classes.overload(conversation, max_requests), classes.CLASS_COLUMNS, classes.class_values
            ),
            "replicas": lambda: report.answer(arms.replicas(conversation, max_requests, speed)),
        }
    if code is not None:
        asked["stale"] = stale
    if not asked:
        print("name at least one trace: --trace, --code-trace", file=sys.stderr)
        return 2
    for name in QUESTIONS:
        if name in asked and (not options.only or name in options.only):
            asked[name]()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The real router in simulated clusters.")
    parser.add_argument("--trace", type=Path, help="Mooncake conversation trace (.jsonl)")
    parser.add_argument("--code-trace", type=Path, help="Azure code trace (.csv)")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, help="default: all")
    parser.add_argument("--requests", type=int, default=_QUICK_REQUESTS, help="first so many of each trace")
    parser.add_argument("--full", action="store_true", help=f"whole traces, {_FULL_SEEDS} seeds")
    parser.add_argument("--seeds", type=int, help=f"default {_QUICK_SEEDS}, with --full {_FULL_SEEDS}")
    parser.add_argument("--speed", type=float, default=1.3, help="of the conversation's replay")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, help="JSON lines; an existing file is replaced")
    return parser


if __name__ == "__main__":
    sys.exit(main())
