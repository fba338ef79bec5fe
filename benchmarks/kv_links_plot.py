"""Plots of the links benchmark, from its JSON lines alone: ``python -m benchmarks.kv_links --plot``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks import kv_links_summary as summary

_CONTROLLER, _NONE, _ORACLE = "controller", "none", "oracle"
_TITLES = {"drift": "all requests at one quality floor", "mixed": "a third each: exact, high, balanced"}


def plot(results: Path, folder: Path) -> list[Path]:
    """Write kv_links_jct.png and kv_links_drift.png of the last whole run in `results`. Returns what was written."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    folder.mkdir(exist_ok=True)
    written = []
    runs = _latest(lines, "kv_links.run")
    if runs:
        written.append(_jct(runs, folder / "kv_links_jct.png"))
    drifts = _latest(lines, "kv_links.drift_run")
    if drifts:
        written.append(_drift(drifts, folder / "kv_links_drift.png"))
    for path in written:
        print(path, flush=True)
    return written


def _latest(lines: Sequence[dict[str, Any]], benchmark: str) -> list[dict[str, Any]]:
    """Return the lines of the newest invocation that has any of this kind."""
    found = [line for line in lines if line["benchmark"] == benchmark]
    return [line for line in found if line["run_at"] == found[-1]["run_at"]]


def _style(policy: str, position: float) -> dict[str, Any]:
    if policy == _CONTROLLER:
        return {"color": "black", "linewidth": 2.4, "marker": "o", "zorder": 5}
    if policy == _NONE:
        return {"color": "tab:red", "linewidth": 1.6, "marker": "x", "linestyle": "--"}
    if policy == _ORACLE:
        return {"color": "tab:green", "linewidth": 1.8, "marker": "+", "linestyle": ":"}
    return {"color": pyplot.get_cmap("turbo")(0.1 + 0.75 * position), "linewidth": 1.2, "marker": "."}


def _jct(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    rows = [row for row in summary.table(runs) if row["jct_mean_s"] is not None]
    policies = _ordered({row["policy"] for row in rows}, {row["policy"]: row["ratio"] or 1.0 for row in rows})
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, name, title in zip(
        axes, ("jct_mean_s", "handoff_mean_s"), ("job completion time", "exposed hand-off"), strict=True
    ):
        for i, policy in enumerate(policies):
            mine = [row for row in rows if row["policy"] == policy]
            style = _style(policy, i / max(1, len(policies) - 1))
            axis.plot([r["mbit_per_s"] for r in mine], [r[name] * 1e3 for r in mine], label=policy, **style)
            if name == "jct_mean_s":
                low, high = ([r["jct_mean_ends_s"][end] * 1e3 for r in mine] for end in (0, 1))
                axis.fill_between([r["mbit_per_s"] for r in mine], low, high, color=style["color"], alpha=0.15)
        axis.set(xscale="log", yscale="log", xlabel="link, Mbit/s", ylabel=f"mean {title}, ms", title=title)
        axis.grid(which="both", alpha=0.25)
    axes[0].legend(fontsize="small")
    scenario = json.loads(runs[0]["scenario"])
    figure.suptitle(
        f"tandem-tiny KV ({runs[0]['bytes_per_token']} B/token), {scenario['tokens_per_s']:.0f} prompt tokens/s "
        f"(Poisson), {scenario['num_requests']} requests x {len({r['repetition'] for r in runs})}; {runs[0]['link']}",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _drift(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    experiments = [name for name in _TITLES if any(run["experiment"] == name for run in runs)]
    figure, (above, *below) = pyplot.subplots(
        1 + len(experiments),
        1,
        figsize=(11, 3 + 4 * len(experiments)),
        sharex=True,
        height_ratios=(1, *(3 for _ in experiments)),
        layout="constrained",
    )
    segments = runs[0]["segments"]
    width = segments[1]["begins_s"] - segments[0]["begins_s"]
    middles = [segment["begins_s"] + width / 2 for segment in segments]
    rates = [segment["mbit_per_s"] for segment in segments]
    above.bar(middles, rates, width=width, color="lightsteelblue")
    above.set(
        yscale="log", ylabel="link, Mbit/s", title=f"a link that drifts {max(rates) / min(rates):.0f}x down and up"
    )
    for axis, experiment in zip(below, experiments, strict=True):
        _segments(axis, [run for run in runs if run["experiment"] == experiment], middles)
        axis.set(title=_TITLES[experiment], yscale="log", ylabel="mean JCT of a segment's arrivals, ms")
    below[-1].set(xlabel="arrival, s")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _segments(axis: Any, runs: Sequence[dict[str, Any]], middles: Sequence[float]) -> None:
    by_policy: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_policy.setdefault(run["policy"], []).append(run)
    policies = _ordered(set(by_policy), {run["policy"]: run["ratio"] or 1.0 for run in runs})
    for i, policy in enumerate(policies):
        mine = by_policy[policy]
        means = [summary.median_of([run["segments"][s]["jct_mean_s"] for run in mine]) for s, _ in enumerate(middles)]
        total = summary.median_of([run["jct_mean_s"] for run in mine]) or float("nan")
        exact = summary.median_of([run["exact_share"] for run in mine]) or 0.0
        axis.plot(
            middles,
            [float("nan") if mean is None else mean * 1e3 for mean in means],
            label=f"{policy}: {total * 1e3:.0f} ms, {exact:.0%} exact",
            **_style(policy, i / max(1, len(policies) - 1)),
        )
    axis.grid(which="both", alpha=0.25)
    axis.legend(fontsize="small", title="mean JCT; KV that arrives bit for bit")


def _ordered(policies: set[str], ratios: dict[str, float]) -> list[str]:
    """Return the static profiles by ratio, then oracle and controller."""
    last = [name for name in (_ORACLE, _CONTROLLER) if name in policies]
    return sorted(policies - set(last), key=lambda name: (ratios[name], name)) + last
