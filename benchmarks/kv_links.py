"""Job completion time over a shaped link: no compression, every static profile, and the controller.

Two processes in two network namespaces joined by a veth pair (`benchmarks.netns`): a prefill worker's end with the real
`KvSender`, a decode worker's end with the real `KvReceiver`, real KV of tandem-tiny, requests that arrive whether or
not the link keeps up. What computes is paced like a GPU: it waits, and leaves the cores to codecs and transport.
`kv_links_workload` states the scenario and why it is what it is. Three experiments, one JSON line per run and per sum:

- `table`: five bandwidths, a factor of 50, in equal steps; the slowest is bound by the wire even with the smallest
  profile's bytes, the fastest is above what a core codes. Policies take turns in random order; in one repetition all
  of them get the same requests. Medians over the repetitions, with ends.
- `drift`: one run in which the rate goes down and up again over these bandwidths, nine segments of equal length.
  Against two oracles (`kv_links_summary.drift` says how each is made).
- `mixed`: the same drift with requests of three quality floors (exact, high, balanced, a third each). Only static
  profiles that meet the strictest floor are admissible; the controller, and the oracle, choose per request.

JCT: arrival to last token. TTFT: arrival to first token, which the prefill worker streams itself. Second: arrival to
second token, the first that needs the hand-off. Without root (or tc) the sender's rate cap stands in for the link, the
reason is printed, and nothing drifts.

    python -m benchmarks.kv_links                # all of it: about 12 minutes on two cores
    python -m benchmarks.kv_links --quick        # the machinery, small: a minute and a half
    python -m benchmarks.kv_links --plot         # docs/kv_links_*.png from the newest results
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import kv_links_summary as summary
from benchmarks.kv_links_fleet import Fleet, Order, open_fleet, totals
from benchmarks.kv_links_model import layout_of_tiny, record_kv, texts_of_tiny
from benchmarks.kv_links_policies import CONTROLLER, ORACLE, Shelf, open_shelf
from benchmarks.kv_links_workload import Scenario, requests_of
from benchmarks.netns import NetnsUnavailable, ShapedPair, end_on_signals
from core.errors import ConfigError
from kv_transfer.profile import NONE

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "benchmarks" / "results"
_MBIT = (200.0, 532.0, 1414.0, 3761.0, 10_000.0)
_SCHEDULERS = {os.SCHED_OTHER: "default", os.SCHED_FIFO: "fifo", os.SCHED_RR: "rr"}
_EXPERIMENTS = ("table", "drift", "mixed")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and how long."""

    mbit: tuple[float, ...]
    drift_mbit: tuple[float, ...]
    experiments: tuple[str, ...]
    policies: tuple[str, ...]
    repetitions: int
    drift_repetitions: int
    num_requests: int
    drift_requests: int
    floor: float
    seed: int
    trace: str

    def scenario(self, num_requests: int, repetition: int, floors: tuple[float, ...] = ()) -> Scenario:
        return Scenario(
            seed=self.seed + repetition,
            num_requests=num_requests,
            floors=floors or (self.floor,),
            trace=self.trace,
        )


class Journal:
    """Prints lines, and appends them to the results."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self._path = path
        self._facts = facts
        self._begun = time.monotonic()

    def emit(self, benchmark: str, **values: Any) -> dict[str, Any]:
        line = {"benchmark": benchmark, **values, **self._facts}
        if self._path is not None:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def note(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun:6.1f} s  {text}", flush=True)


async def run_all(plan: Plan, fleet: Fleet, shelf: Shelf, journal: Journal, can_drift: bool) -> None:
    admissible = _admissible(plan, shelf, plan.floor)
    await _warm_up(plan, fleet)
    rows: list[dict[str, Any]] = []
    if "table" in plan.experiments:
        rows = await _table(plan, fleet, journal, admissible)
    if not can_drift:
        journal.note("no drift: only a shaped link can change its rate under way")
        return
    if "drift" in plan.experiments:
        floors = {plan.floor: admissible}
        await _drift(plan, fleet, journal, "drift", plan.policies, floors, rows)
    if "mixed" in plan.experiments:
        floors = {floor: _admissible(plan, shelf, floor) for floor in (1.0, 0.99, 0.97)}
        ours = [name for name in plan.policies if name == CONTROLLER]
        await _drift(plan, fleet, journal, "mixed", (*floors[1.0], *ours), floors, rows)


def _admissible(plan: Plan, shelf: Shelf, floor: float) -> list[str]:
    return [name for name in shelf.admissible(floor) if name in plan.policies]


async def _warm_up(plan: Plan, fleet: Fleet) -> None:
    """Compile every kernel and touch every page, unmeasured."""
    for policy in plan.policies:
        await fleet.run(Order(policy, plan.scenario(6, 0), ((0.0, 1e10),)))


async def _table(plan: Plan, fleet: Fleet, journal: Journal, admissible: Sequence[str]) -> list[dict[str, Any]]:
    runs = []
    rng = random.Random(plan.seed)
    for repetition in range(plan.repetitions):
        for mbit in plan.mbit:
            for policy in rng.sample(plan.policies, len(plan.policies)):
                order = Order(policy, plan.scenario(plan.num_requests, repetition), ((0.0, mbit * 1e6),))
                values = totals(await fleet.run(order))
                place = {"mbit_per_s": mbit, "policy": policy, "repetition": repetition}
                runs.append(journal.emit("kv_links.run", **place, **values, scenario=order.scenario.model_dump_json()))
                journal.note(f"{mbit:7.0f} Mbit/s  {policy:14}  {_words(values)}")
    rows = summary.table(runs)
    for row in rows:
        journal.emit("kv_links.cell", **row)
    for line in summary.headline(rows, runs, admissible):
        journal.emit("kv_links.headline", admissible=list(admissible), **line)
        print(json.dumps({"benchmark": "kv_links.headline", **line}), flush=True)
    return rows


async def _drift(
    plan: Plan,
    fleet: Fleet,
    journal: Journal,
    experiment: str,
    policies: Sequence[str],
    floors: Mapping[float, Sequence[str]],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Run the drifting trace under every policy, and under the oracle when the table says what was best at each rate.

    `floors` holds those that the requests have, and the static profiles that meet each.
    """
    down = sorted(plan.drift_mbit, reverse=True)
    trace = [*down, *reversed(down[:-1])]
    names = [*policies, *([ORACLE] if rows else [])]
    admissible = floors[max(floors)]
    rng = random.Random(plan.seed + 1)
    runs = []
    for repetition in range(plan.drift_repetitions):
        scenario = plan.scenario(plan.drift_requests, 100 + repetition, tuple(floors))
        segment_s = requests_of(scenario)[-1].arrival_s / len(trace)
        rates = tuple((i * segment_s, mbit * 1e6) for i, mbit in enumerate(trace))
        schedule = tuple(
            (i * segment_s, floor, summary.best_at(rows, mbit, allowed))
            for i, mbit in enumerate(trace)
            for floor, allowed in floors.items()
            if rows
        )
        for policy in rng.sample(names, len(names)):
            run = await fleet.run(Order(policy, scenario, rates, schedule))
            values = totals(run)
            segments = [
                {"begins_s": round(i * segment_s, 3), "mbit_per_s": mbit, **_segment(run, i * segment_s, segment_s)}
                for i, mbit in enumerate(trace)
            ]
            place = {"experiment": experiment, "policy": policy, "repetition": repetition, "segments": segments}
            facts = {"scenario": scenario.model_dump_json(), "schedule": schedule if policy == ORACLE else ()}
            runs.append(journal.emit("kv_links.drift_run", **place, **values, **facts))
            journal.note(f"{experiment:>14}  {policy:14}  {_words(values)}")
    line = summary.drift(runs, admissible)
    journal.emit("kv_links.drift", experiment=experiment, admissible=list(admissible), **line)
    print(json.dumps({"benchmark": "kv_links.drift", "experiment": experiment, **line}), flush=True)


def _segment(run: dict[str, Any], begins_s: float, seconds: float) -> dict[str, Any]:
    rows = [row for row in run["requests"] if begins_s <= row["arrival_s"] <= begins_s + seconds]
    done = [row["jct_s"] for row in rows if row["jct_s"] is not None]
    profiles = [row["profile"] for row in rows]
    return {
        "requests": len(rows),
        "jct_mean_s": round(sum(done) / len(done), 5) if done else None,
        "profiles": {name: profiles.count(name) for name in sorted(set(profiles))},
    }


def _words(values: dict[str, Any]) -> str:
    def ms(name: str) -> str:
        return "-" if values[name] is None else f"{values[name] * 1e3:8.1f}"

    return (
        f"jct {ms('jct_mean_s')} p99 {ms('jct_p99_s')}  ttft {ms('ttft_mean_s')}  second {ms('second_mean_s')}  "
        f"hand-off {ms('handoff_mean_s')} ms  ratio {values['ratio']}  failed {values['failures']}  "
        f"estimate {values['estimated_mbit_per_s']} Mbit/s  "
        f"cpu {values['near_cpu_s']:.1f}+{values['far_cpu_s']:.1f} s  {values['profiles']}"
    )


def _machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "scheduler": _SCHEDULERS.get(os.sched_getscheduler(0), "other"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def _calibrate(pair: ShapedPair, mbit: Sequence[float], journal: Journal) -> None:
    for rate in mbit:
        found = pair.calibrate(rate * 1e6)
        values = {
            "mbit_per_s": rate,
            "measured_mbit_per_s": round(found.measured_bits_per_s / 1e6, 1),
            "rtt_us": round(found.rtt_us, 1),
            "shaper": pair.shaper,
            "congestion_control": pair.congestion_control,
        }
        journal.emit("kv_links.link", **values)
        journal.note(f"{rate:7.0f} Mbit/s  a plain socket gets {values['measured_mbit_per_s']:.0f}")


def _plot(results: Path | None) -> None:
    found = results or max(_RESULTS.glob("kv_links_*.jsonl"), default=None)
    if found is None:
        sys.exit("there are no results to plot; run the benchmark first")
    try:
        from benchmarks.kv_links_plot import plot
    except ImportError as error:
        sys.exit(f"plots need the extra `profiles`: {error}")
    plot(found, _ROOT / "docs")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_links", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="the machinery, small: a minute and a half")
    parser.add_argument("--only", nargs="+", choices=_EXPERIMENTS, default=list(_EXPERIMENTS), help="experiments")
    parser.add_argument("--bandwidths", type=float, nargs="+", metavar="MBIT_PER_S", help=f"default {_MBIT}")
    parser.add_argument("--policies", nargs="+", help="none, profiles, controller; default: all")
    parser.add_argument("--repetitions", type=int, help="of the table (default 3)")
    parser.add_argument("--drift-repetitions", type=int, help="of each drift (default 2)")
    parser.add_argument("--requests", type=int, help="of a run of the table (default 60)")
    parser.add_argument("--drift-requests", type=int, help="of a run of a drift (default 270)")
    parser.add_argument("--floor", type=float, default=0.97, help="quality floor of all requests (default 0.97)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", default="", help="lengths from this file: Azure's CSV or Mooncake's JSON lines")
    parser.add_argument("--library", default="auto", help="auto, ladder (hand-made, unmeasured), or a path")
    parser.add_argument("--rate-cap", action="store_true", help="no namespaces: the sender's rate cap is the link")
    parser.add_argument("--output", type=Path, help="results; default: benchmarks/results/kv_links_<date>.jsonl")
    parser.add_argument("--plot", action="store_true", help="only redo the plots, from --output or the newest results")
    return parser.parse_args()


def _plan(args: argparse.Namespace, shelf: Shelf) -> Plan:
    known = list(shelf.encoders) + ([CONTROLLER] if shelf.profiles else [])
    policies = args.policies or known
    if args.quick and not args.policies:
        policies = [name for name in known if name in (NONE, known[-2], CONTROLLER)]
    unknown = sorted(set(policies) - set(known))
    if unknown:
        sys.exit(f"no policy {unknown[0]!r}; there are {', '.join(known)}")
    return Plan(
        mbit=tuple(args.bandwidths or ((_MBIT[0], _MBIT[2], _MBIT[4]) if args.quick else _MBIT)),
        experiments=tuple(args.only),
        policies=tuple(policies),
        repetitions=args.repetitions or (1 if args.quick else 3),
        drift_mbit=tuple(args.bandwidths or _MBIT),
        drift_repetitions=args.drift_repetitions or (1 if args.quick else 2),
        num_requests=args.requests or (40 if args.quick else 60),
        drift_requests=args.drift_requests or (120 if args.quick else 270),
        floor=args.floor,
        seed=args.seed,
        trace=str(Path(args.trace).resolve()) if args.trace else "",
    )


def main() -> None:
    args = _arguments()
    if args.plot:
        _plot(args.output)
        return
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    output = args.output or _RESULTS / f"kv_links_{today}.jsonl"
    torch.set_num_threads(1)
    layout = layout_of_tiny()
    try:
        shelf = open_shelf(args.library, layout)
    except ConfigError as error:
        sys.exit(f"{error}")
    plan = _plan(args, shelf)
    with ExitStack() as stack:
        stack.enter_context(end_on_signals())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-kv-links-")))
        pair, link = None, "rate cap of the sender"
        if not args.rate_cap:
            try:
                pair = stack.enter_context(ShapedPair())
                link = f"veth shaped by tc {pair.shaper}, {pair.congestion_control}"
            except NetnsUnavailable as error:
                print(f"no network namespaces: {error}; the sender's rate cap is the link", flush=True)
        facts = {
            "link": link,
            "bytes_per_token": layout.bytes_per_token,
            "floor": plan.floor,
            "run_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
        }
        journal = Journal(output, facts)
        if pair is not None:
            _calibrate(pair, plan.mbit, journal)
        torch.save(record_kv(texts_of_tiny()), folder / "kv.pt")
        journal.note("recorded KV of held-out text")

        async def live() -> None:
            async with open_fleet(pair, folder / "kv.pt", args.library) as fleet:
                await run_all(plan, fleet, shelf, journal, pair is not None)

        asyncio.run(live())
        journal.note(f"results in {output}")


if __name__ == "__main__":
    main()
