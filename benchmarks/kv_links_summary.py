"""What the runs of the links benchmark say together. Pure: from lines to lines, so that `--plot` can redo it."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
_SECONDS = (
    *("jct_mean_s", "jct_p50_s", "jct_p99_s", "ttft_mean_s", "ttft_p99_s"),
    *("second_mean_s", "second_p99_s", "handoff_mean_s", "handoff_p99_s"),
)


def table(runs: Iterable[Line]) -> list[dict[str, Any]]:
    """Return one row per (bandwidth, policy): medians over the repetitions, and the least and greatest mean JCT."""
    cells: dict[tuple[float, str], list[Line]] = {}
    for run in runs:
        cells.setdefault((run["mbit_per_s"], run["policy"]), []).append(run)
    return [_cell(mbit, policy, lines) for (mbit, policy), lines in sorted(cells.items())]


def headline(rows: Sequence[Line], runs: Sequence[Line], admissible: Sequence[str]) -> list[dict[str, Any]]:
    """Return, per bandwidth, the controller against `none` and against the best static profile that meets the floor.

    `over_best_static` is the ratio of the medians; `over_best_static_paired` the median over repetitions (same seeds)
    of the ratios within each, with its least and greatest.
    """
    lines = []
    for mbit in sorted({row["mbit_per_s"] for row in rows}):
        at = {row["policy"]: row for row in rows if row["mbit_per_s"] == mbit and row["jct_mean_s"] is not None}
        statics = [at[name] for name in admissible if name in at]
        line: dict[str, Any] = {"mbit_per_s": mbit}
        if statics:
            best = min(statics, key=lambda row: row["jct_mean_s"])
            line |= {"best_static": best["policy"], "best_static_jct_s": best["jct_mean_s"]}
        if "controller" in at:
            ours = at["controller"]
            line |= {name: ours[name] for name in ("profiles", "exact_share")} | {
                "controller_jct_s": ours["jct_mean_s"]
            }
            if "none" in at:
                line["none_over_controller"] = round(at["none"]["jct_mean_s"] / ours["jct_mean_s"], 3)
                line["none_over_controller_second"] = round(at["none"]["second_mean_s"] / ours["second_mean_s"], 3)
            if statics:
                line["over_best_static"] = round(ours["jct_mean_s"] / best["jct_mean_s"], 4)
                here = [run for run in runs if run["mbit_per_s"] == mbit]
                line |= _paired("over_best_static_paired", here, "controller", best["policy"])
        lines.append(line)
    return lines


def drift(runs: Sequence[Line], admissible: Sequence[str]) -> dict[str, Any]:
    """Return the controller against every static profile and two oracles, over the drifting trace.

    `oracle_run` is a real run that changes, at each segment, to the static profile that was best at that rate when the
    rate stood still. `composed` is not a run: for each segment the least mean JCT that any admissible static profile
    had of the requests that arrived in it, each with its own past; nobody could have had all of them.
    """
    by_policy: dict[str, list[Line]] = {}
    for run in runs:
        by_policy.setdefault(run["policy"], []).append(run)
    jct = {name: median_of([run["jct_mean_s"] for run in lines]) for name, lines in by_policy.items()}
    known = {name: value for name, value in jct.items() if value is not None}
    statics = {name: known[name] for name in admissible if name in known}
    line: dict[str, Any] = {"jct_mean_s": known, "failures": {n: sum(r["failures"] for r in by_policy[n]) for n in jct}}
    line["spread"] = {name: _ends([run["jct_mean_s"] for run in lines]) for name, lines in by_policy.items()}
    for name in ("second_mean_s", "handoff_mean_s", "handoff_p99_s", "exact_share"):
        line[name] = {policy: median_of([run[name] for run in lines]) for policy, lines in by_policy.items()}
    if not statics or "controller" not in known:
        return line
    best = min(statics, key=lambda name: statics[name])
    composed = _composed([by_policy[name] for name in statics])
    line |= {
        "best_static": best,
        "best_static_over_controller": round(statics[best] / known["controller"], 4),
        "statics_over_controller": {name: round(value / known["controller"], 3) for name, value in statics.items()},
        "composed_jct_s": round(composed, 5),
        "regret_to_composed": round(known["controller"] / composed - 1, 4),
    }
    line |= _paired("controller_over_best_static_paired", runs, "controller", best)
    if "oracle" in known:
        line["regret_to_oracle_run"] = round(known["controller"] / known["oracle"] - 1, 4)
        line |= _paired("controller_over_oracle_paired", runs, "controller", "oracle")
    return line


def best_at(rows: Sequence[Line], mbit: float, admissible: Sequence[str]) -> str:
    """Return the admissible static profile with the least mean JCT at the bandwidth of the table nearest to `mbit`."""
    known = [row for row in rows if row["policy"] in admissible and row["jct_mean_s"] is not None]
    nearest = min((row["mbit_per_s"] for row in known), key=lambda there: abs(math.log(there / mbit)))
    here = [row for row in known if row["mbit_per_s"] == nearest]
    return str(min(here, key=lambda row: row["jct_mean_s"])["policy"])


def _cell(mbit: float, policy: str, lines: Sequence[Line]) -> dict[str, Any]:
    profiles: dict[str, int] = {}
    for line in lines:
        for name, count in line["profiles"].items():
            profiles[name] = profiles.get(name, 0) + count
    row: dict[str, Any] = {"mbit_per_s": mbit, "policy": policy, "repetitions": len(lines)}
    row |= {name: median_of([line[name] for line in lines]) for name in (*_SECONDS, "ratio", "exact_share")}
    row["jct_mean_ends_s"] = _ends([line["jct_mean_s"] for line in lines])
    row["failures"] = sum(line["failures"] for line in lines)
    row["profiles"] = profiles
    return row


def _composed(policies: Sequence[Sequence[Line]]) -> float:
    """Return the mean over all requests of the best segments; `policies` holds the runs of each static profile."""
    total, count = 0.0, 0
    for segment in range(len(policies[0][0]["segments"])):
        counts = [runs[0]["segments"][segment]["requests"] for runs in policies]
        means = [median_of([run["segments"][segment]["jct_mean_s"] for run in runs]) for runs in policies]
        best = min((mean for mean in means if mean is not None), default=None)
        if best is not None:
            total += best * counts[0]
            count += counts[0]
    return total / count if count else float("nan")


def _paired(name: str, runs: Sequence[Line], ours: str, theirs: str) -> dict[str, Any]:
    """Return the ratio of the mean JCTs within each repetition: the median, and its ends."""
    means = {(run["policy"], run["repetition"]): run["jct_mean_s"] for run in runs}
    ratios = [
        mean / means[theirs, repetition]
        for (policy, repetition), mean in means.items()
        if policy == ours and mean is not None and means.get((theirs, repetition))
    ]
    return {name: median_of(ratios), f"{name}_ends": _ends(ratios)}


def median_of(values: Sequence[float | None]) -> float | None:
    """Return the median of what is there; None when nothing is."""
    present = [value for value in values if value is not None]
    return round(statistics.median(present), 5) if present else None


def _ends(values: Sequence[float | None]) -> list[float]:
    present = [value for value in values if value is not None]
    return [round(min(present), 5), round(max(present), 5)] if present else []
