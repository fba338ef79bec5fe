"""`tandem bench --simulate`: how the routing policies would serve recorded traffic, in virtual time.

Loads the simulator only when the command runs.
"""

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from core.errors import ConfigError

if TYPE_CHECKING:
    from router.routing.config import PolicyName
    from simulator.comparison import Arm
    from simulator.machines import Machine

_WORKERS = re.compile(r"(\d+)\+(\d+)\Z")


def bench(
    trace: Annotated[Path, typer.Option(help="Recorded traffic: Mooncake's .jsonl or Azure's .csv.")],
    simulate: Annotated[
        bool, typer.Option("--simulate", help="In virtual time: the real router before simulated workers.")
    ] = False,
    workers: Annotated[str, typer.Option(help="Prefill + decode workers.")] = "8+8",
    policy: Annotated[
        list[str] | None, typer.Option(help="cost, or one to compare with; may be repeated; default: all.")
    ] = None,
    machine: Annotated[
        str, typer.Option(help="Of each worker: a known name, or a .json file with a fit of yours.")
    ] = "llama70b-a800x8",
    gateways: Annotated[int, typer.Option(min=1, help="That share the traffic.")] = 1,
    speed: Annotated[float, typer.Option(min=0.01, help="Replay so many times as fast as recorded.")] = 1.0,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Instead of a replay: Poisson, requests per second.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first so many of the trace.")] = None,
    ttft: Annotated[float, typer.Option(min=0.001, help="Target for the first token, in seconds.")] = 30.0,
    tpot: Annotated[float, typer.Option(min=0.0001, help="Target for the mean gap between later ones.")] = 0.1,
    queued_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens that a prefill worker queues; more is refused.")
    ] = 262_144,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per policy; intervals need two.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON lines; an existing file is replaced.")] = None,
) -> None:
    """Compare routing policies on recorded traffic, in virtual time: the router itself before simulated workers.

    Columns: mean, median and 99th percentile of TTFT; mean TPOT; share within the targets as Mooncake counts (TTFT, and
    the slowest tenth of the gaps); share that was refused or did not end (in the mean TTFT as the longest one, at least
    the target); share of prompt tokens found in caches; orders per request. With two seeds or more: and half the 95 %
    interval.

    Examples:

        tandem bench --simulate --trace conversation.jsonl --workers 8+8 --seeds 5

        tandem bench --simulate --trace code.csv --policy cost --policy least_loaded --rate 30 --machine opt13b-a100-tp2
    """
    if not simulate:
        raise ConfigError("bench measures simulated clusters only: add --simulate")
    from core.service_class import ServiceClass, Slo
    from simulator.comparison import MOONCAKE_TARGETS, compare, serving_values
    from simulator.comparison import processes as start_processes
    from simulator.goodput import Targets
    from simulator.machines import get_machine
    from simulator.tables import table
    from simulator.traffic import ClassShare, Workload

    slo = Slo(ttft_s=ttft, tpot_s=tpot)
    share = ClassShare(ServiceClass.INTERACTIVE, 1.0, slo)
    workload = Workload(trace, requests, speed=speed, rate_per_s=rate, classes=(share,))
    targets = Targets(ttft, tpot, tbt_s=tpot, max_gap_s=MOONCAKE_TARGETS.max_gap_s)
    block_tokens = workload.block_tokens  # a trace that cannot be read says so before anything runs
    kind = get_machine(machine)
    arms = [_arm(name, kind, workers, gateways, block_tokens, queued_tokens) for name in _checked(policy)]
    with nullcontext() if processes == 1 else start_processes(processes) as pool:
        rows = list(compare(arms, workload, range(seeds), measure=partial(serving_values, targets=targets), pool=pool))
    rate_text = f"Poisson at {rate:g}/s" if rate is not None else f"replayed at {speed:g}x"
    print(f"{trace.stem}, {rate_text}, on {workers} workers {kind.name}, {gateways} gateway(s), {seeds} seed(s)")
    print("\n".join(table(rows)))
    if output is not None:
        labels = {"trace": trace.stem, "workers": workers, "machine": kind.name, "speed": speed, "rate": rate}
        output.write_text("".join(row.json_line(**labels) + "\n" for row in rows), encoding="utf-8")


def _checked(names: list[str] | None) -> list["PolicyName"]:
    from router.routing.config import PolicyName

    known: tuple[PolicyName, ...] = get_args(PolicyName)
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"no policy {', '.join(unknown)}; known are {', '.join(known)}")
    return [policy for policy in known if not names or policy in names]


def _arm(
    name: "PolicyName", machine: "Machine", workers: str, gateways: int, block_tokens: int, queued_tokens: int
) -> "Arm":
    from router.routing.config import LinkPriors, RoutingConfig
    from simulator.answers import WorkerTerms
    from simulator.cluster import OPEN_DOOR, Scenario, router_config
    from simulator.comparison import Arm

    counts = _WORKERS.match(workers)
    if counts is None:
        raise ConfigError(f"workers are prefill+decode, as 8+8, not {workers!r}")
    links = LinkPriors(same_rack_bytes_per_s=machine.link.bytes_per_s, same_rack_rtt_s=machine.link.message_s)
    scenario = Scenario(
        config=router_config(RoutingConfig(policy=name, links=links), admission=OPEN_DOOR),
        num_prefill=int(counts[1]),
        num_decode=int(counts[2]),
        machine=machine,
        terms=WorkerTerms(max_queued_tokens=queued_tokens),
        num_gateways=gateways,
        block_tokens=block_tokens,
    )
    return Arm(name, scenario)
