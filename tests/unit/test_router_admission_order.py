"""Order in the queue under sustained overload: classes, aging, shares, and that everybody is served in the end."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import RejectedError, RejectReason
from core.ids import RequestId
from core.service_class import ServiceClass
from router.admission.claims import RANK, Amount, Claim
from router.admission.queue import AdmissionQueue, QueueRules

INTERACTIVE, DEADLINE, BATCH = ServiceClass.INTERACTIVE, ServiceClass.DEADLINE, ServiceClass.BATCH
NUM_PLACES = 12
LARGEST = 8  # tokens of one request
RULES = QueueRules(
    bounds=Amount(NUM_PLACES, 1000, 10**6),
    reserved_ratio=0.1,
    aging_s=10.0,
    max_slack_s=20.0,
    output_token_weight=2.0,
    rate_window_s=10.0,
    max_retry_after_s=60.0,
    retry_min_s=0.01,
    retry_max_s=0.02,
    shares={"double": 2.0},
    default_share=1.0,
)


class Overloaded:
    """A queue before a cluster that takes one request per second; the others are refused."""

    def __init__(self, **changes: object) -> None:
        self.queue = AdmissionQueue(replace(RULES, **changes), random.Random(0))  # type: ignore[arg-type]
        self.now = 0.0
        self.claims: dict[RequestId, Claim] = {}
        self.served: list[Claim] = []
        self.shed: list[Claim] = []
        self.output_tokens: Callable[[Claim], int] = lambda claim: claim.expected_output_tokens
        self._saturate()

    def offer(
        self,
        service_class: ServiceClass = INTERACTIVE,
        tenant: str = "",
        tokens: int = 1,
        *,
        output: int = 0,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Claim | None:
        """Return the claim if it entered."""
        name = RequestId(f"{len(self.claims):06d}")
        claim = Claim(name, tenant, service_class, priority, deadline_s, self.now, tokens, 10, output)
        self.claims[name] = claim
        try:
            self.shed += [self.claims[one.request_id] for one in self.queue.enter(claim, self.now)]
        except RejectedError:
            return None
        return claim

    def tick(self) -> Claim | None:
        """A second passes; return who was accepted."""
        self.now += 1.0
        accepted = None
        for name in self.queue.take(self.now):
            claim = self.claims[name]
            if accepted is None:
                accepted = claim
                self.queue.leave(name, self.now)
                self.queue.end(name, self.now, self.output_tokens(claim))
                self.served.append(claim)
            else:
                self.queue.put_back(claim, self.now)
        self.queue.check()
        return accepted

    def drain(self) -> list[str]:
        """Serve all who wait; return their ids."""
        before = len(self.served)
        while len(self.queue) > 1:
            assert self.tick() is not None, "something is served every second"
        return [claim.request_id for claim in self.served[before:]]

    def _saturate(self) -> None:
        """One that is always refused at first shows the queue that the cluster is full."""
        plug = Claim(RequestId("plug"), "plug", BATCH, 0, None, 0.0, 0, 0, 0)
        self.queue.enter(plug, 0.0)
        self.queue.take(0.0)
        probe = Claim(RequestId("probe"), "plug", BATCH, 0, None, 0.0, 0, 0, 0)
        self.queue.enter(probe, 0.0)
        self.queue.take(0.0)
        self.queue.put_back(probe, 0.0)
        self.queue.end(probe.request_id, 0.0, 0)


def test_classes_are_served_one_after_the_other() -> None:
    cluster = Overloaded()
    offered = [cluster.offer(one) for one in (BATCH, DEADLINE, INTERACTIVE, BATCH, INTERACTIVE, DEADLINE)]
    order = cluster.drain()
    assert order == [offered[position].request_id for position in (2, 4, 1, 5, 0, 3)]  # type: ignore[union-attr]


def test_waiting_lifts_a_request_one_class_at_a_time() -> None:
    cluster = Overloaded(max_slack_s=0.0)
    old = cluster.offer(BATCH, "old")
    assert old is not None
    overtaken_by: Counter[ServiceClass] = Counter()
    for second in range(100):
        cluster.offer(DEADLINE if second < 8 else INTERACTIVE, f"{second}")
        if (served := cluster.tick()) is old:
            break
        assert served is not None
        overtaken_by[served.service_class] += 1
    assert cluster.now >= 20.0, "it had to age past both"
    assert overtaken_by[DEADLINE] >= 8
    assert cluster.now <= 20.0 + NUM_PLACES


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"deadline_s": 15.0}, {"deadline_s": 5.0}, id="earlier deadline"),
        pytest.param({}, {"deadline_s": 5.0}, id="a deadline before none"),
        pytest.param({"deadline_s": 5.0}, {"deadline_s": 5.0, "priority": 1}, id="priority"),
    ],
)
def test_within_a_tenant_the_more_urgent_goes_first(first: dict[str, float], second: dict[str, float]) -> None:
    cluster = Overloaded()
    later = cluster.offer(DEADLINE, **first)  # type: ignore[arg-type]
    sooner = cluster.offer(DEADLINE, **second)  # type: ignore[arg-type]
    assert cluster.drain() == [sooner.request_id, later.request_id]  # type: ignore[union-attr]


def test_a_priority_counts_only_among_the_requests_of_its_tenant() -> None:
    cluster = Overloaded()
    modest = [cluster.offer(tenant="modest") for _ in range(3)]
    for _ in range(3):
        cluster.offer(tenant="loud", priority=10)
    order = cluster.drain()
    assert [order.index(one.request_id) for one in modest if one is not None] == [0, 2, 4]


@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from(ServiceClass), st.sampled_from("abc"), st.integers(1, LARGEST), st.integers(-2, 2)),
        min_size=60,
        max_size=60,
    ),
    service_class=st.sampled_from(ServiceClass),
    num_per_second=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_ticket_is_served_whatever_arrives(
    arrivals: list[tuple[ServiceClass, str, int, int]], service_class: ServiceClass, num_per_second: int
) -> None:
    _serve_against(
        lambda number: arrivals[number % len(arrivals)], service_class, num_per_second=num_per_second, span=2
    )


@pytest.mark.parametrize("service_class", ServiceClass)
@pytest.mark.parametrize(
    "arrival",
    [
        pytest.param(lambda number: (INTERACTIVE, "flood", 1, 0), id="one tenant floods"),
        pytest.param(lambda number: (INTERACTIVE, f"{number}", LARGEST, 0), id="each request is of a new tenant"),
        pytest.param(lambda number: (INTERACTIVE, f"{number % 9}", 1, 0), id="many tenants with small requests"),
        pytest.param(lambda number: (INTERACTIVE, "victim", 1, 2), id="its own tenant, with more priority"),
        pytest.param(lambda number: (DEADLINE, f"{number}", 1, 0), id="deadlines of new tenants"),
    ],
)
def test_no_flood_starves_a_class(
    arrival: Callable[[int], tuple[ServiceClass, str, int, int]], service_class: ServiceClass
) -> None:
    _serve_against(arrival, service_class, num_per_second=3, span=2)


def _serve_against(
    arrival: Callable[[int], tuple[ServiceClass, str, int, int]],
    service_class: ServiceClass,
    *,
    num_per_second: int,
    span: int,
) -> None:
    """Keep the queue full; one of `service_class` must be served within the bound. `span`: highest priority."""
    cluster = Overloaded()
    for number in range(30):  # its tenant has had much lately
        cluster.offer(INTERACTIVE, "victim", LARGEST)
        if number % 2:
            cluster.offer(INTERACTIVE, "other", 1)
        cluster.tick()
    victim = cluster.offer(service_class, "victim", LARGEST)
    while victim is None:
        cluster.tick()
        victim = cluster.offer(service_class, "victim", LARGEST)
    entered_at, number = cluster.now, 0
    # Until it is in the first band; until nobody may overtake it in its tenant's line; then, for it and each of those
    # before it there, until all others have been served three of the largest requests.
    line = NUM_PLACES
    in_order = RANK[service_class] * RULES.aging_s + RULES.max_slack_s + 2 * span * RULES.aging_s
    bound = in_order + line * 3 * NUM_PLACES * LARGEST
    while victim not in cluster.served:
        for _ in range(num_per_second):
            kind, tenant, tokens, priority = arrival(number)
            cluster.offer(kind, tenant, tokens, priority=priority)
            number += 1
        assert cluster.tick() is not None
        if victim in cluster.shed:
            return  # it was told at once: nobody waits for nothing
        assert cluster.now - entered_at <= bound


def test_under_lasting_overload_every_class_is_served() -> None:
    cluster = Overloaded(bounds=Amount(40, 1000, 10**6))
    rng = random.Random(3)
    for _ in range(1_500):
        for service_class in (INTERACTIVE, INTERACTIVE, DEADLINE, BATCH):  # four per second, one is served
            cluster.offer(service_class, rng.choice("abc"), rng.randint(1, LARGEST))
        cluster.tick()
    served = Counter(claim.service_class for claim in cluster.served)
    assert served[INTERACTIVE] > served[BATCH] >= 40
    assert served[DEADLINE] >= 40
    for service_class in ServiceClass:
        last = max(claim.arrived_at for claim in cluster.served if claim.service_class is service_class)
        assert last > 1_300, "to the end, not only at the beginning"


@pytest.mark.parametrize(("tenant", "share"), [("b", 1.0), ("double", 2.0)])
@pytest.mark.parametrize("factor", [0, 1, 4])
def test_tenants_that_wait_are_served_tokens_by_their_shares(tenant: str, share: float, factor: int) -> None:
    """However many requests each brings, and though answers are longer or shorter than expected."""
    cluster = Overloaded(reserved_ratio=0.0)
    cluster.output_tokens = lambda claim: claim.expected_output_tokens * (factor if claim.tenant == tenant else 1)
    rng = random.Random(5)
    lead, leads, largest = 0.0, [], 0.0
    for _ in range(400):
        for _ in range(4):
            cluster.offer(INTERACTIVE, "a", rng.randint(1, 4), output=rng.randint(0, 2))
        cluster.offer(INTERACTIVE, tenant, rng.randint(1, LARGEST), output=rng.randint(0, 4))
        cluster.offer(INTERACTIVE, tenant, rng.randint(1, LARGEST), output=rng.randint(0, 4))
        served = cluster.tick()
        assert served is not None
        weight = 1.0 if served.tenant == "a" else share
        cost = (served.num_tokens + 2 * cluster.output_tokens(served)) / weight
        largest = max(largest, cost, (served.num_tokens + 2 * served.expected_output_tokens) / weight)
        lead += cost if served.tenant == "a" else -cost
        leads.append(lead)
    assert max(leads) - min(leads) <= 2 * largest
    assert {claim.tenant for claim in cluster.served[-20:]} == {"a", tenant}


# --- shedding ---------------------------------------------------------------------------------------------------------


def full(*offered: tuple[ServiceClass, str], **changes: object) -> tuple[Overloaded, list[Claim]]:
    cluster = Overloaded(bounds=Amount(len(offered) + 1, 1000, 10**6), **{"reserved_ratio": 0.0, **changes})
    claims = []
    for service_class, tenant in offered:
        claim = cluster.offer(service_class, tenant)
        assert claim is not None
        claims.append(claim)
    return cluster, claims


@pytest.mark.parametrize(
    ("waiting", "newcomer", "shed"),
    [
        pytest.param([(BATCH, ""), (BATCH, ""), (DEADLINE, "")], INTERACTIVE, 1, id="the newest of batch"),
        pytest.param([(DEADLINE, ""), (INTERACTIVE, "")], INTERACTIVE, 0, id="then of deadline"),
        pytest.param([(BATCH, ""), (INTERACTIVE, "")], DEADLINE, 0, id="batch for deadline"),
        pytest.param([(INTERACTIVE, ""), (INTERACTIVE, "")], INTERACTIVE, None, id="nobody for an equal"),
        pytest.param([(INTERACTIVE, ""), (DEADLINE, "")], BATCH, None, id="nobody for batch"),
        pytest.param([(BATCH, "many"), (BATCH, "few"), (BATCH, "many")], INTERACTIVE, 2, id="of who holds most"),
        pytest.param([(BATCH, "many"), (BATCH, "many"), (BATCH, "many")], BATCH, 2, id="an equal of who holds more"),
        pytest.param([(BATCH, "a"), (BATCH, "b")], BATCH, None, id="not of who would hold less"),
    ],
)
def test_who_can_wait_is_shed_first(
    waiting: list[tuple[ServiceClass, str]], newcomer: ServiceClass, shed: int | None
) -> None:
    cluster, claims = full(*waiting)
    entered = cluster.offer(newcomer)
    assert (entered is None) == (shed is None)
    assert cluster.shed == ([] if shed is None else [claims[shed]])
    cluster.queue.check()


def test_shedding_gives_a_reason_and_a_time() -> None:
    cluster, claims = full((BATCH, ""))
    new = Claim(RequestId("new"), "", INTERACTIVE, 0, None, 0.0, 1, 1, 0)
    (shed,) = cluster.queue.enter(new, 0.0)
    assert shed.request_id == claims[0].request_id
    assert shed.error.reason is RejectReason.SHED
    assert 0 < shed.error.retry_after_s <= RULES.max_retry_after_s


def test_nobody_is_shed_in_vain() -> None:
    cluster, _ = full((BATCH, ""), (INTERACTIVE, ""))
    assert cluster.offer(INTERACTIVE, tokens=1000) is None
    assert cluster.shed == []


def test_who_has_grown_old_is_not_shed_for_the_young() -> None:
    cluster, claims = full((BATCH, ""), (INTERACTIVE, ""), aging_s=0.25, max_slack_s=0.0)
    assert cluster.tick() is claims[0], "older, and in the first band by now"
    cluster, claims = full((BATCH, "busy"), (BATCH, "busy"), aging_s=0.25, max_slack_s=0.0)
    assert cluster.tick() is claims[0]
    assert cluster.offer(INTERACTIVE, "busy") is not None
    assert cluster.offer(INTERACTIVE, "busy") is None
    assert cluster.shed == []


def test_each_class_keeps_its_part_of_the_places() -> None:
    cluster = Overloaded(bounds=Amount(21, 1000, 10**6), reserved_ratio=0.1)  # two for each class; one is the plug's
    while cluster.offer(INTERACTIVE, tokens=1) is not None:
        pass
    queued = cluster.queue.queued_by_class()
    assert queued[INTERACTIVE] == 21 - 2 - 2, "the plug is of batch"
    assert cluster.offer(BATCH) is not None
    assert cluster.offer(BATCH) is None
    assert cluster.offer(DEADLINE) is not None
    assert cluster.offer(DEADLINE) is not None
    assert cluster.offer(DEADLINE) is None
    assert cluster.offer(INTERACTIVE) is None
    assert cluster.shed == [], "what is kept for a class is not taken from it"
