"""Questions of `benchmarks.router_simulation` about overload: refusing early without oscillation, and who waits."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.router_simulation_arms import UNBOUNDED, Question, routing
from core.service_class import ServiceClass, Slo
from router.admission.config import AdmissionConfig, ClassConfig, DoorMode
from router.routing.config import Term
from router.routing.modes import Mode
from simulator import goodput
from simulator.answers import WorkerTerms
from simulator.cluster import Scenario, router_config
from simulator.comparison import Arm, serving_values
from simulator.confidence import cross_correlation
from simulator.goodput import Targets
from simulator.machines import MACHINES
from simulator.outcomes import Run
from simulator.traffic import ClassShare, Workload

OSCILLATION_COLUMNS = ("p_d_correlation", "decode_swing", "prefill_swing", "good_per_s", "mooncake", "missed", "tpot_s")
CLASS_COLUMNS = tuple(
    f"{service_class}_{value}" for service_class in ServiceClass for value in ("ttft_p99_s", "in_time", "unserved")
)
CLASSES = (
    ClassShare(ServiceClass.INTERACTIVE, 0.5, Slo(ttft_s=10.0)),
    ClassShare(ServiceClass.DEADLINE, 0.25, Slo(deadline_s=60.0)),
    ClassShare(ServiceClass.BATCH, 0.25),
)

_SEVENTY = MACHINES["llama70b-a800x8"]
_TPOT_S = 0.030
_TARGETS = Targets(ttft_s=30.0, tpot_s=_TPOT_S, tbt_s=1.2 * _TPOT_S, max_gap_s=1.0)


def oscillation(conversation: Path, max_requests: int | None) -> Question:
    """Thirteen prefill and three decode workers, at more than either pool can bear (Mooncake, early rejection).

    What is refused by what decodes now, while prompts compute that will decode soon, comes too late and then too much.
    Arrivals are drawn, not replayed: what swings then, swings by the refusals.
    """
    slo = Slo(ttft_s=30.0, tpot_s=_TPOT_S)
    workload = Workload(
        conversation, max_requests, rate_per_s=12.0, classes=(ClassShare(ServiceClass.INTERACTIVE, 1.0, slo),)
    )

    def arm(name: str, door: DoorMode, *ignored: Term, reports_reserved: bool = True) -> Arm:
        admission = AdmissionConfig(interactive=ClassConfig(door=door))
        routed = routing(_SEVENTY, modes=(Mode.REMOTE_PREFILL,), ignored_terms=frozenset(ignored))
        config = router_config(routed, admission=admission)
        terms = WorkerTerms(max_queued_tokens=UNBOUNDED, reports_reserved=reports_reserved)
        return Arm(name, Scenario(config=config, machine=_SEVENTY, terms=terms, num_prefill=13, num_decode=3))

    arms = (
        arm("no refusal", DoorMode.OFF),
        arm("by what decodes now", DoorMode.ENFORCE, Term.FORECAST, Term.CREDIT, reports_reserved=False),
        arm("by all that is promised", DoorMode.ENFORCE, Term.FORECAST),
        arm("by the load predicted", DoorMode.ENFORCE),
    )
    title = f"13+3 workers {_SEVENTY.name}, conversation trace drawn at 12/s, TPOT target {_TPOT_S * 1e3:.0f} ms"
    return Question("oscillation", title, workload, arms)


def oscillation_values(run: Run) -> Mapping[str, float]:
    """How the two pools' loads move, and against each other: below 0 they swing in anti-phase."""
    prefill = [float(sum(sample.queued_tokens)) for sample in run.samples]
    decode = [float(sum(sample.decoding)) for sample in run.samples]
    return {
        **serving_values(run, _TARGETS),
        "p_d_correlation": cross_correlation(prefill, decode),
        "decode_swing": _swing(decode),
        "prefill_swing": _swing(prefill),
        "good_per_s": goodput.good_requests_per_s(run, partial(goodput.meets_mooncake, targets=_TARGETS)),
    }


def overload(conversation: Path, max_requests: int | None) -> Question:
    """All classes at more than the prefill pool can do, with and without aging."""
    workload = Workload(conversation, max_requests, speed=4.0, classes=CLASSES, tenants=("one", "two", "three"))

    def arm(name: str, aging_s: float) -> Arm:
        off = ClassConfig(door=DoorMode.OFF)
        admission = AdmissionConfig(interactive=off, deadline=off, batch=off, aging_s=aging_s)
        config = router_config(
            routing(_SEVENTY),
            admission=admission,
            request_timeout_s=3600.0,
            max_queued_requests=100_000,
            max_queued_tokens=10**10,
        )
        return Arm(name, Scenario(config=config, machine=_SEVENTY))

    arms = (arm("aging 10 s", 10.0), arm("aging 60 s", 60.0), arm("no aging", 1e6))
    return Question("classes", f"8+8 workers {_SEVENTY.name}, three classes at 4x", workload, arms)


def class_values(run: Run) -> Mapping[str, float]:
    """By class: TTFT of the slowest hundredth, the share in time, the share that was not served at all."""
    values = dict(serving_values(run))
    for service_class in ServiceClass:
        found = [one for one in run.outcomes if one.request.service_class is service_class]
        of_class = replace(run, outcomes=tuple(found))
        values[f"{service_class}_ttft_p99_s"] = serving_values(of_class)["ttft_p99_s"]
        in_time = sum(goodput.is_in_time(one, one.request.slo) for one in found)
        values[f"{service_class}_in_time"] = in_time / max(1, len(found))
        values[f"{service_class}_unserved"] = sum(not one.is_served for one in found) / max(1, len(found))
    return values


def _swing(load: list[float]) -> float:
    """Standard deviation over mean."""
    mean = sum(load) / len(load) if load else 0.0
    if mean == 0:
        return 0.0
    return float((sum((value - mean) ** 2 for value in load) / len(load)) ** 0.5 / mean)
