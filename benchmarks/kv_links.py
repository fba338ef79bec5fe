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

    python -m benchmarks.kv_links                # all of it: about 11 minutes on two cores
    python -m benchmarks.kv_links --quick        # the machinery, small: a minute and a half
    python -m benchmarks.kv_links --plot         # docs/kv_links_*.png from the newest results
"""

import argparse
import asyncio
import datetime
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.kv_links_experiments import EXPERIMENTS, Journal, Plan, run_all
from benchmarks.kv_links_fleet import open_fleet
from benchmarks.kv_links_model import layout_of_tiny, record_kv, texts_of_tiny
from benchmarks.kv_links_policies import CONTROLLER, Shelf, open_shelf
from benchmarks.netns import NetnsUnavailable, ShapedPair, end_on_signals
from benchmarks.setting import describe_setting
from core.errors import ConfigError
from kv_transfer.profile import NONE

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "benchmarks" / "results"
_MBIT = (200.0, 532.0, 1414.0, 3761.0, 10_000.0)


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
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments")
    parser.add_argument("--bandwidths", type=float, nargs="+", metavar="MBIT_PER_S", help=f"default {_MBIT}")
    parser.add_argument("--policies", nargs="+", help="none, profiles, controller; default: all")
    parser.add_argument("--repetitions", type=int, help="of the table (default 3)")
    parser.add_argument("--drift-repetitions", type=int, help="of each drift (default 3)")
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
        smallest = (
            max(shelf.profiles, key=lambda p: p.ratio * p.meets(args.floor)).name if shelf.profiles else known[-1]
        )
        policies = [name for name in known if name in (NONE, smallest, CONTROLLER)]
    unknown = sorted(set(policies) - set(known))
    if unknown:
        sys.exit(f"no policy {unknown[0]!r}; there are {', '.join(known)}")
    return Plan(
        mbit=tuple(args.bandwidths or ((_MBIT[0], _MBIT[2], _MBIT[4]) if args.quick else _MBIT)),
        experiments=tuple(args.only),
        policies=tuple(policies),
        repetitions=args.repetitions or (1 if args.quick else 3),
        drift_mbit=tuple(args.bandwidths or _MBIT),
        drift_repetitions=args.drift_repetitions or (1 if args.quick else 3),
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
            "machine": describe_setting("torch"),
        }
        journal = Journal(output, facts)
        for profile in shelf.profiles:
            low = None if profile.quality is None else profile.quality.agreement_low
            journal.emit("kv_links.profile", name=profile.name, ratio=profile.ratio, agreement_low=low)
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
