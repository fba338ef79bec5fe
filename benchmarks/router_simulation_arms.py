"""What `benchmarks.router_simulation` compares: for each question the traffic, the arms, and what would answer it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.service_class import ServiceClass, Slo
from router.routing.config import LinkPriors, PolicyName, RoutingConfig, Term
from router.routing.modes import Mode
from simulator.answers import WorkerTerms
from simulator.cluster import OPEN_DOOR, Scenario, router_config
from simulator.comparison import Arm, serving_values
from simulator.goodput import Targets
from simulator.machines import MACHINES, Machine
from simulator.outcomes import Run
from simulator.traffic import ClassShare, Workload

PUBLISHED_ORDER: tuple[PolicyName, ...] = ("random", "round_robin", "least_loaded", "cache_aware_local", "cost")
ABLATION_COLUMNS = ("ttft_s", "ttft_p99_s", "tpot_s", "second_gap_s", "mooncake", "hit_ratio", "asked")
STALE_LOADS = (0.7, 0.8, 0.9, 1.0, 1.1)

INTERACTIVE = ClassShare(ServiceClass.INTERACTIVE, 1.0, Slo(ttft_s=30.0, tpot_s=0.1))  # Mooncake's thresholds
UNBOUNDED = 10**9
_SEVENTY = MACHINES["llama70b-a800x8"]
_THIRTEEN = MACHINES["opt13b-a100-tp2"]
_CODE_TARGETS = Targets(ttft_s=1.0, tpot_s=0.1, tbt_s=0.1, max_gap_s=1.0)
_BETWEEN_RACKS = 25e9 / 8
_ANSWERING = WorkerTerms(max_queued_tokens=UNBOUNDED)
_STALE_WORKERS = WorkerTerms(max_queued_tokens=UNBOUNDED, heartbeat_s=1.0, reports_changes=False, honours_bounds=False)


@dataclass(frozen=True, slots=True)
class Question:
    """One table."""

    name: str
    title: str
    workload: Workload
    arms: tuple[Arm, ...]


def routing(machine: Machine, policy: PolicyName = "cost", **changes: Any) -> RoutingConfig:
    """A routing configuration as an operator of such machines has it: the links are known, the speeds are learned."""
    links = LinkPriors(
        same_rack_bytes_per_s=machine.link.bytes_per_s,
        same_rack_rtt_s=machine.link.message_s,
        same_zone_bytes_per_s=min(machine.link.bytes_per_s, machine.link.far_bytes_per_s),
    )
    return RoutingConfig(policy=policy, links=links, **changes)


def scenario(machine: Machine, policy: PolicyName = "cost", **changes: Any) -> Scenario:
    """Eight prefill and eight decode workers; the door is open, and the workers' queues are as long as they get.

    Every request goes from a prefill to a decode worker, unless `modes` says otherwise: the other policies know nothing
    else, and the use of decode workers for prompts is another question than the choice among prefill workers.
    """
    chosen = {"modes": (Mode.REMOTE_PREFILL,), **changes}
    config = router_config(routing(machine, policy, **chosen), admission=OPEN_DOOR)
    return Scenario(config=config, machine=machine, terms=_ANSWERING)


def policies(conversation: Path, max_requests: int | None, speed: float) -> Question:
    """Mean TTFT of the published policies and of the one cost (as in Mooncake, FAST'25)."""
    arms = [Arm("ours" if name == "cost" else name, scenario(_SEVENTY, name)) for name in PUBLISHED_ORDER]
    arms.append(Arm("ours, all modes", scenario(_SEVENTY, modes=tuple(Mode))))
    title = f"8+8 workers {_SEVENTY.name}, conversation trace at {speed:g}x"
    return Question("policies", title, _replay(conversation, max_requests, speed), tuple(arms))


def ablations(conversation: Path, max_requests: int | None, speed: float) -> Question:
    """Each term of the cost left out alone, where it has something to say: two racks, 25 Gbit/s between them.

    What workers tell with every answer makes credit needless; it is left out where they report once a second, too.
    """

    def arm(name: str, *ignored: Term, terms: WorkerTerms = _ANSWERING) -> Arm:
        machine = replace(_SEVENTY, link=replace(_SEVENTY.link, far_bytes_per_s=_BETWEEN_RACKS))
        built = scenario(machine, ignored_terms=frozenset(ignored))
        return Arm(name, replace(built, num_racks=2, terms=terms))

    arms = [arm("ours"), *(arm(f"without {term}", term) for term in Term)]
    arms += [arm("reports every 1 s", terms=_STALE_WORKERS)]
    arms += [arm("reports every 1 s, without credit", Term.CREDIT, terms=_STALE_WORKERS)]
    title = f"each term of the cost left out, 8+8 workers in two racks, conversation trace at {speed:g}x"
    return Question("ablations", title, _replay(conversation, max_requests, speed), tuple(arms))


def _replay(conversation: Path, max_requests: int | None, speed: float) -> Workload:
    return Workload(conversation, max_requests, speed=speed, classes=(INTERACTIVE,))


def stale_reports(code: Path, max_requests: int | None) -> list[Question]:
    """Periodic reports against asking the worker itself, from 70 to 110 % load (P/D-Serve, section 3)."""
    rate_at_full_load = _capacity_per_s(code, max_requests, _THIRTEEN, num_workers=8)
    asks = replace(scenario(_THIRTEEN, "least_loaded"), terms=WorkerTerms(max_queued_tokens=4096))
    arms = (
        Arm("random", scenario(_THIRTEEN, "random")),
        Arm(
            "reports every 1 s",
            replace(scenario(_THIRTEEN, "least_loaded", ignored_terms=frozenset({Term.CREDIT})), terms=_STALE_WORKERS),
        ),
        Arm("accept or reject", asks),
        Arm("ours", scenario(_THIRTEEN)),
        Arm(
            "oracle: no delay",
            replace(
                scenario(_THIRTEEN, "least_loaded"),
                terms=WorkerTerms(max_queued_tokens=UNBOUNDED, report_interval_s=1e-6),
                wire_delay_s=1e-6,
            ),
        ),
    )
    return [
        Question(
            f"stale_{load:.0%}",
            f"8+8 workers {_THIRTEEN.name}, code trace, Poisson at {load:.0%} of the prefill pool",
            Workload(code, max_requests, rate_per_s=load * rate_at_full_load),
            arms,
        )
        for load in STALE_LOADS
    ]


def replicas(conversation: Path, max_requests: int | None, speed: float) -> Question:
    """Three gateways that share the traffic, and one that has it all."""
    shared = replace(scenario(_SEVENTY), num_gateways=3)
    arms = (
        Arm("1 gateway", scenario(_SEVENTY)),
        Arm("3 gateways", shared),
        Arm("3, store gone for a minute", replace(shared, store_outage_s=(60.0, 120.0))),
        Arm("3 that tell nothing", replace(shared, shares_news=False)),
    )
    title = f"gateways, conversation trace at {speed:g}x"
    return Question("replicas", title, _replay(conversation, max_requests, speed), arms)


def stale_values(run: Run) -> Mapping[str, float]:
    """As for every run, with a target for short prompts."""
    return serving_values(run, _CODE_TARGETS)


def _capacity_per_s(code: Path, max_requests: int | None, machine: Machine, num_workers: int) -> float:
    """Requests per second that keep `num_workers` busy with prompts of this recording, each computed alone."""
    requests = Workload(code, max_requests).requests(0)
    busy_s = sum(machine.prefill.prompt_s(one.prompt_tokens, 0, machine.chunk_tokens) for one in requests)
    return num_workers * len(requests) / busy_s
