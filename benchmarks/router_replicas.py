"""Several gateways against one: real processes, a real Redis, paced workers.

1. `attainment`: the same requests at the same times through one gateway and through several, in turns; the share that
   meets its targets should not differ by more than a point.
2. `kill`: several gateways; in mid-run one of them is killed, then Redis is, and comes back.
3. `warm`: how long after it listens a new gateway is connected to everybody and finds the sessions' prefixes.

Workers count what happened among them: `doubled` are prompts that a prefill worker accepted behind others while another
one had none; `late_*_ms` is how late this very process was woken, so a figure from a busy machine can be told from one
from a quiet one. Prints one JSON line per result. Run ``python -m benchmarks.router_replicas --help``.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from benchmarks.paced_worker import Pace
from benchmarks.replica_bed import Bed, GatewayProcess, bed
from benchmarks.replica_load import Arrival, Client, Lateness, Result, Targets, Workload, summary

TARGETS = Targets(ttft_s=0.3, tpot_s=0.06)


def tell(result: str, **facts: Any) -> None:
    print(json.dumps({"benchmark": "router_replicas", "result": result, **facts}), flush=True)


def seen_by_workers(one: Bed) -> dict[str, Any]:
    floor = one.floor
    prefills = [floor.most_held.get(worker.worker_id, 0) for worker in floor.prefills]
    return {"accepted": floor.accepted, "refused": floor.refused, "doubled": floor.doubled, "most_held": prefills}


async def measure(one: Bed, arrivals: list[Arrival]) -> list[Result]:
    client = Client([gateway.address for gateway in one.gateways])
    try:
        await client.warm_up()
        return await client.run(arrivals)
    finally:
        await client.close()


async def attainment(options: argparse.Namespace) -> None:
    """One against several, in turns."""
    found: dict[int, list[float]] = {1: [], options.replicas: []}
    for repetition in range(options.repetitions):
        arrivals = Workload(options.rate, options.duration, options.seed + repetition).arrivals()
        for num_gateways in found:
            async with bed(num_gateways, options.prefills, options.decodes, Pace()) as one:
                with Lateness() as lateness:
                    facts = summary(await measure(one, arrivals), TARGETS)
                found[num_gateways].append(float(facts["attainment_percent"]))
                facts |= lateness.facts()
                tell("attainment", gateways=num_gateways, repetition=repetition, **facts, **seen_by_workers(one))
    one_mean, many_mean = (sum(values) / len(values) for values in found.values())
    tell(
        "attainment_difference",
        gateways=options.replicas,
        one_percent=round(one_mean, 2),
        many_percent=round(many_mean, 2),
        points=round(many_mean - one_mean, 2),
    )


async def kill(options: argparse.Namespace) -> None:
    """What killing a gateway, and then Redis, does to the requests that arrive meanwhile."""
    arrivals = Workload(options.rate, options.duration, options.seed).arrivals()
    phases = {"before": 0.0, "gateway killed": 0.3, "redis killed": 0.5, "redis back": 0.75}
    async with bed(options.replicas, options.prefills, options.decodes, Pace()) as one:
        steps: list[Callable[[], Awaitable[None]]] = [one.gateways[-1].kill, one.kill_redis, one.start_redis]

        async def upset() -> None:
            at = 0.0
            for part, step in zip(list(phases.values())[1:], steps, strict=True):
                await asyncio.sleep((part - at) * options.duration)
                at = part
                await step()

        upsetting = asyncio.create_task(upset())
        results = await measure(one, arrivals)
        await upsetting
        tell("kill", phase="all", gateways=options.replicas, **summary(results, TARGETS), **seen_by_workers(one))
        starts = [part * options.duration for part in phases.values()] + [float("inf")]
        for name, start, end in zip(phases, starts, starts[1:], strict=False):
            tell("kill", phase=name, **summary([each for each in results if start <= each.at_s < end], TARGETS))


async def warm(options: argparse.Namespace) -> None:
    """A gateway that joins a running cluster."""
    arrivals = Workload(options.rate, 0.4 * options.duration, options.seed).arrivals()
    longest = {arrival.session: arrival for arrival in arrivals}
    async with bed(options.replicas - 1, options.prefills, options.decodes, Pace()) as one:
        await measure(one, arrivals)
        newcomer = await one.start_gateway()
        connected_s = await newcomer.wait_connected(len(one.workers))
        known = list(longest.values())[-100:]
        first_hit_s = await first_hit(newcomer, known)
        halves = [known[n::2] for n in range(2)]
        veteran, other = Client([one.gateways[0].address]), Client([newcomer.address])
        try:
            answers = await asyncio.gather(
                *(
                    client.run([Arrival(0.1 * n, each.session, each.prompt, 2) for n, each in enumerate(half)])
                    for client, half in zip((veteran, other), halves, strict=True)
                )
            )
        finally:
            await veteran.close()
            await other.close()
        old, new = (summary(results, TARGETS)["hit_percent"] for results in answers)
        tell(
            "warm",
            workers=len(one.workers),
            connected_after_s=round(connected_s, 2),
            first_hit_after_s=first_hit_s,
            hit_percent_of_newcomer=new,
            hit_percent_of_veteran=old,
        )


async def first_hit(newcomer: GatewayProcess, known: list[Arrival]) -> float | None:
    """Return how long after it listened a gateway first placed a known prompt where it is cached."""
    client = Client([newcomer.address])
    try:
        for arrival in known:
            result = (await client.run([Arrival(0.0, arrival.session, arrival.prompt, 2)]))[0]
            if result.finished is not None and result.finished.usage.cached_tokens > 0.8 * len(arrival.prompt):
                return round(asyncio.get_running_loop().time() - newcomer.listening_at, 2)
    finally:
        await client.close()
    return None


PARTS: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, None]]] = {
    "attainment": attainment,
    "kill": kill,
    "warm": warm,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--prefills", type=int, default=6)
    parser.add_argument("--decodes", type=int, default=3)
    parser.add_argument("--rate", type=float, default=44.0, help="requests per second")
    parser.add_argument("--duration", type=float, default=24.0, help="seconds of arrivals per run")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for part in options.parts:
        asyncio.run(PARTS[part](options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
