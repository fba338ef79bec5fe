"""Virtual token counters: shares between tenants that wait, whatever the others do."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission.fairness import FairShares

SHARES = {"a": 1.0, "b": 1.0, "double": 2.0}


def shares_of(tenant: str) -> float:
    return SHARES.get(tenant, 1.0)


def fair(*tenants: str) -> FairShares:
    shares = FairShares(shares_of)
    for tenant in tenants:
        shares.join(tenant)
    return shares


STEPS = st.lists(
    st.tuples(
        st.floats(0.1, 100.0),  # cost of the next request
        st.sampled_from(["", "join", "leave", "correct"]),
        st.sampled_from(["c", "d", "e"]),
    ),
    max_size=120,
)


@given(steps=STEPS, other=st.sampled_from(["b", "double"]))
@settings(max_examples=150, deadline=None)
def test_two_that_both_wait_are_served_alike_over_any_time(steps: list[tuple[float, str, str]], other: str) -> None:
    shares = fair("a", other)
    served = {"a": 0.0, other: 0.0}
    lead, largest = [0.0], 0.0
    last: dict[str, tuple[float, int]] = {}
    for cost, change, third in steps:
        if change == "join":
            shares.join(third)
        elif change == "leave":
            shares.leave(third)
        elif change == "correct" and third in last:
            charged, lift = last.pop(third)
            shares.correct(third, -charged / 2, lift)
        tenant = shares.first()
        last[tenant] = cost, shares.serve(tenant, cost)
        largest = max(largest, cost / shares_of(tenant))
        if tenant in served:
            served[tenant] += cost / shares_of(tenant)
        lead.append(served["a"] - served[other])
        shares.check()
    assert max(lead) - min(lead) <= 2 * largest + 1e-6, "over every interval within the run"


@given(costs=st.lists(st.floats(1.0, 50.0), min_size=2, max_size=60), pause=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_a_pause_saves_nothing(costs: list[float], pause: int) -> None:
    shares = fair("a", "b")
    shares.leave("b")
    for number in range(pause):
        shares.serve("a", costs[number % len(costs)])
    shares.join("b")
    lead, leads = 0.0, [0.0]
    for cost in costs:
        tenant = shares.first()
        shares.serve(tenant, cost)
        lead += cost if tenant == "b" else -cost
        leads.append(lead)
    assert max(leads) - min(leads) <= 2 * max(costs) + 1e-6


@pytest.mark.parametrize("num_tenants", [2, 8, 32])
def test_endless_newcomers_do_not_starve_one_that_was_served(num_tenants: int) -> None:
    """Each newcomer asks once and goes. The one that waits stands above the floor: it was served a long request."""
    shares = fair("patient", "first")
    shares.leave("first")
    shares.serve("patient", 100.0)
    waiting = [f"new {number}" for number in range(num_tenants - 1)]
    for tenant in waiting:
        shares.join(tenant)
    num_served, num_new = 0, len(waiting)
    while shares.first() != "patient":
        gone = shares.first()
        shares.serve(gone, 10.0)
        shares.join(f"new {num_new}")
        num_new += 1
        shares.leave(gone)
        num_served += 1
        assert num_served <= 8 * num_tenants * 100 / 10 + num_tenants
    assert num_served > 0, "they were behind it and went first, as is fair"


def test_what_was_expected_wrongly_is_made_up_for() -> None:
    """One tenant's answers are longer than expected, the other's shorter; what was served is alike in the end."""
    shares = fair("a", "b")
    really = {"a": 0.0, "b": 0.0}
    ends: list[tuple[str, float, int]] = []
    for _ in range(600):
        tenant = shares.first()
        lift = shares.serve(tenant, 20.0)
        cost = 30.0 if tenant == "a" else 10.0
        ends.append((tenant, cost - 20.0, lift))
        if len(ends) > 5:  # answers take their time
            shares.correct(*ends.pop(0))
        really[tenant] += cost
    assert abs(really["a"] - really["b"]) <= 5 * 30.0, "what is under way is not known yet"


def test_what_is_given_back_after_a_lift_is_no_savings() -> None:
    shares = fair("a", "b")
    lift = shares.serve("a", 100.0)
    shares.leave("a")
    for _ in range(30):
        shares.serve("b", 10.0)
    shares.join("a")
    before = shares.counter("a")
    assert before > 200.0, "lifted"
    shares.correct("a", -90.0, lift)
    assert shares.counter("a") == before
    shares.check()


def test_equal_tenants_take_turns_in_the_order_of_their_coming() -> None:
    shares = fair("a", "b", "c")
    order = []
    for _ in range(6):
        order.append(shares.first())
        shares.serve(order[-1], 5.0)
    assert order == ["a", "b", "c", "a", "b", "c"]


def test_once_nobody_waits_all_are_even() -> None:
    shares = fair("a", "b")
    lift = shares.serve("a", 100.0)
    shares.leave("a")
    shares.leave("b")
    shares.join("a")
    shares.join("b")
    shares.correct("a", 50.0, lift)  # of a request that nobody else waited for
    assert shares.counter("a") == shares.counter("b")
    assert shares.first() == "a"


def test_memory_is_bounded_by_who_waits() -> None:
    rng = random.Random(1)
    shares = fair("steady")
    for number in range(5_000):
        shares.join(f"{number}")
        tenant = shares.first()
        lift = shares.serve(tenant, rng.uniform(1.0, 100.0))
        shares.correct(tenant, 10_000.0, lift)
        shares.leave(f"{number}")
        assert shares.num_remembered <= 1_100
    assert len(shares) == 1
    shares.check()
