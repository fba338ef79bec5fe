"""The experiments of the links benchmark: which runs are made, in which order, and what is said of them."""

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kv_links_summary as summary
from benchmarks.kv_links_fleet import Fleet, Order, totals
from benchmarks.kv_links_policies import CONTROLLER, ORACLE, Shelf
from benchmarks.kv_links_workload import Scenario, requests_of

EXPERIMENTS = ("table", "drift", "mixed")


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
