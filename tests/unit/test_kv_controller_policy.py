"""What is chosen, and why: floors, budgets, margins, hysteresis, cooldowns, links of which nothing is known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from kv_transfer.choice import TransferQuestion
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.decisions import DecisionReason
from kv_transfer.controller.model import predict
from kv_transfer.controller.policy import place
from kv_transfer.controller.static_policy import StaticPolicy
from kv_transfer.session import NackReason
from tests.fakes.arms import ARMS, EIGHTH, GB, NONE, PIPELINE, arm, outcome, policy, question

CONFIG = ControllerConfig(exploration=0.0)


def bare_times(asked: TransferQuestion) -> dict[str, float]:
    where = place(
        asked, CONFIG, PIPELINE, goodput_bytes_per_s=asked.link.goodput_bytes_per_s, compute_s=asked.terms.compute_s
    )
    return {one.name: predict(one, where.situation).total_s for one in ARMS}


@pytest.mark.parametrize(
    ("goodput", "floor", "expected"),
    [
        (0.02 * GB, 0.9, "eighth"),
        (0.02 * GB, 0.98, "quarter"),
        (0.02 * GB, 0.99, "half"),
        (0.02 * GB, 1.0, "lossless"),
        (0.4 * GB, 0.9, "quarter"),
        (20 * GB, 0.9, "none"),
        (20 * GB, 1.0, "none"),
    ],
)
def test_the_fastest_that_the_floor_allows(goodput: float, floor: float, expected: str) -> None:
    decision = policy().decide(question(goodput=goodput, floor=floor), 0.0)
    assert decision.chosen.profile == expected
    assert decision.reason is DecisionReason.FASTEST
    assert decision.chosen.predicted_s == pytest.approx(bare_times(decision.question)[expected])


@given(
    st.floats(1e6, 5e10),
    st.integers(1, 1 << 28),
    st.sampled_from([0.0, 0.9, 0.97, 0.98, 0.99, 1.0]),
    st.none() | st.floats(0.0, 2.0),
    st.floats(0.0, 1.0),
    st.integers(0, 1 << 26),
)
def test_floors_hold_and_nothing_allowed_is_much_faster(
    goodput: float, size: int, floor: float, budget_s: float | None, compute_s: float, queued: int
) -> None:
    asked = question(
        raw_bytes=size, goodput=goodput, floor=floor, budget_s=budget_s, compute_s=compute_s, queued_bytes=queued
    )
    decision = policy(config=ControllerConfig(exploration=1.0)).decide(asked, 0.0)
    allowed = {one.name for one in ARMS if one.is_lossless or (floor < 1.0 and one.agreement_low >= floor)}
    considered = [candidate.profile for candidate in decision.candidates]
    assert set(considered) <= allowed
    assert len(considered) == len(set(considered)) <= 4
    assert "none" in considered
    times = {name: time_s for name, time_s in bare_times(asked).items() if name in allowed}
    if decision.reason is not DecisionReason.TRIED:
        assert times[decision.chosen.profile] <= min(times.values()) * 1.051
    if budget_s is not None and min(times.values()) - compute_s <= budget_s:
        assert decision.meets_budget
        assert decision.chosen.predicted_s - compute_s <= budget_s


def test_when_nothing_meets_the_budget_the_fastest_goes() -> None:
    asked = question(goodput=0.02 * GB, budget_s=0.001)
    decision = policy().decide(asked, 0.0)
    assert (decision.chosen.profile, decision.reason) == ("eighth", DecisionReason.BUDGET_MISSED)
    assert not decision.meets_budget


def test_what_hides_behind_the_prefill_is_not_made_lossy() -> None:
    decision = policy().decide(question(goodput=0.15 * GB, compute_s=1.0), 0.0)
    assert decision.chosen.profile == "none"
    fastest = min(decision.candidates, key=lambda candidate: candidate.predicted_s)
    assert fastest.profile != "none"
    assert decision.reason is DecisionReason.HIDDEN


def test_a_prefill_that_is_too_short_to_hide_in_changes_nothing() -> None:
    assert policy().decide(question(goodput=0.02 * GB, compute_s=0.05), 0.0).chosen.profile == "eighth"


def test_of_two_that_are_as_fast_the_less_lossy_goes() -> None:
    twin = arm("twin", 5, 8.0 * 1.004, 0.7 * GB, 0.972)
    slow = policy((*ARMS, twin))
    decision = slow.decide(question(goodput=0.002 * GB), 0.0)
    assert (decision.chosen.profile, decision.reason) == ("eighth", DecisionReason.LESS_LOSSY)


def test_hysteresis_keeps_what_was_chosen_until_it_has_cost_enough() -> None:
    context_config = ControllerConfig(exploration=0.0, hysteresis_ratio=0.05, quality_margin_ratio=0.0)
    crossing = policy((NONE, EIGHTH), context_config)
    fast, even = 50 * GB, _crossing_goodput() / 1.015
    assert crossing.decide(question("first", goodput=fast), 0.0).chosen.profile == "none"
    reasons = [crossing.decide(question(f"{idx}", goodput=even), 60.0 * idx + 60.0).reason for idx in range(12)]
    assert reasons[0] is DecisionReason.KEPT
    assert DecisionReason.FASTEST in reasons  # the debt was paid
    switched = reasons.index(DecisionReason.FASTEST)
    assert set(reasons[:switched]) == {DecisionReason.KEPT}
    assert set(reasons[switched:]) == {DecisionReason.FASTEST}


def test_hysteresis_never_keeps_the_lossier_one() -> None:
    crossing = policy((NONE, EIGHTH), ControllerConfig(exploration=0.0, quality_margin_ratio=0.0))
    assert crossing.decide(question("first", goodput=0.05 * GB), 0.0).chosen.profile == "eighth"
    after = crossing.decide(question("second", goodput=_crossing_goodput() * 1.001), 60.0)
    assert (after.chosen.profile, after.reason) == ("none", DecisionReason.FASTEST)


def _crossing_goodput() -> float:
    """Return the goodput at which `none` and `eighth` are as fast as each other."""
    low, high = 0.05 * GB, 50 * GB
    for _ in range(60):
        middle = (low * high) ** 0.5
        times = bare_times(question(goodput=middle))
        low, high = (middle, high) if times["eighth"] < times["none"] else (low, middle)
    return low


def test_an_unmeasured_link_goes_by_the_prior_of_its_carrier_and_says_so() -> None:
    config = ControllerConfig(exploration=0.0, prior_goodput_bytes_per_s={"tcp": 0.02 * GB, "shm": 50 * GB})
    unsure = policy(config=config)
    over_tcp = unsure.decide(question("a", goodput=None), 0.0)
    assert (over_tcp.chosen.profile, over_tcp.reason) == ("eighth", DecisionReason.UNMEASURED_LINK)
    assert over_tcp.is_prior
    assert over_tcp.goodput_bytes_per_s == 0.02 * GB
    assert unsure.decide(question("b", goodput=None, carrier="shm"), 0.0).chosen.profile == "none"
    assert unsure.decide(question("c", goodput=None, carrier="pigeon"), 0.0).is_prior


def test_three_missed_budgets_of_ten_are_a_cooldown_that_ends() -> None:
    subject = policy(config=ControllerConfig(exploration=0.0, cooldown_s=30.0, knowledge_s=1e-3))
    times = bare_times(question(goodput=0.02 * GB))
    budget_s = times["eighth"] * 1.5
    for idx in range(3):
        asked = question(f"m{idx}", goodput=0.02 * GB, budget_s=budget_s)
        decision = subject.decide(asked, 10.0 * idx)
        assert decision.chosen.profile == "eighth"
        subject.learn(decision, outcome(asked, budget_s * 1.01, ratio=8.0), 10.0 * idx + 1)
    assert subject.decide(question("n", goodput=0.02 * GB), 25.0).chosen.profile == "quarter"
    assert subject.decide(question("other carrier", goodput=0.02 * GB, carrier="gloo"), 25.0).chosen.profile == "eighth"
    assert subject.decide(question("o", goodput=0.02 * GB), 60.0).chosen.profile == "eighth"


@pytest.mark.parametrize(
    ("failure", "is_blamed"), [(NackReason.CODEC, True), (NackReason.LINK_LOST, False), (NackReason.CANCELLED, False)]
)
def test_only_failures_that_a_profile_can_cause_count(failure: NackReason, is_blamed: bool) -> None:
    subject = policy()
    for idx in range(3):
        asked = question(f"f{idx}", goodput=0.02 * GB)
        subject.learn(subject.decide(asked, 0.0), outcome(asked, 0.1, ratio=8.0, failure=str(failure)), 0.0)
    assert (subject.decide(question("g", goodput=0.02 * GB), 0.0).chosen.profile != "eighth") is is_blamed


def test_none_never_rests() -> None:
    subject = policy((NONE,))
    for idx in range(5):
        asked = question(f"f{idx}")
        subject.learn(subject.decide(asked, 0.0), outcome(asked, 0.1, ratio=1.0, failure=NackReason.POOL), 0.0)
    decision = subject.decide(question("g"), 0.0)
    assert (decision.chosen.profile, decision.reason) == ("none", DecisionReason.NO_PROFILES)


def test_a_crowded_link_gets_the_profile_that_frees_it_sooner() -> None:
    lazy = arm("lazy", 1, 2.0, 100 * GB, 0.99)  # no time of its own, much on the wire
    thrifty = arm("thrifty", 2, 4.0, 0.105 * GB, 0.98)
    config = ControllerConfig(exploration=0.0, hysteresis_ratio=0.0, quality_margin_ratio=0.0)
    size = 200_000  # one frame: nothing overlaps
    calm, crowded = policy((NONE, lazy, thrifty), config), policy((NONE, lazy, thrifty), config)
    asked = question(raw_bytes=size, goodput=0.02 * GB)
    assert calm.decide(asked, 0.0).chosen.profile == "lazy"
    profiles = [crowded.decide(question(f"{idx}", raw_bytes=size, goodput=0.02 * GB), idx * 0.003) for idx in range(40)]
    assert profiles[-1].chosen.profile == "thrifty"
    assert profiles[-1].chosen.crowding_s > 0.0


def test_trials_need_slack_and_a_seed_repeats_them() -> None:
    def tried(seed: int, budget_s: float | None) -> list[str]:
        subject = policy(config=ControllerConfig(exploration=2.0), seed=seed)
        asked = [question(str(idx), goodput=0.3 * GB, budget_s=budget_s) for idx in range(300)]
        decisions = [subject.decide(one, 0.0) for one in asked]
        return [decision.chosen.profile for decision in decisions if decision.reason is DecisionReason.TRIED]

    assert tried(1, None)
    assert tried(1, None) == tried(1, None)
    least_s = min(bare_times(question(goodput=0.3 * GB)).values())
    assert not tried(1, least_s * 1.01)


class TestStatic:
    def static(self, name: str) -> StaticPolicy:
        return StaticPolicy(ARMS, name, CONFIG, PIPELINE)

    def test_goes_where_the_floor_allows_it(self) -> None:
        decision = self.static("eighth").decide(question(floor=0.97), 0.0)
        assert (decision.chosen.profile, decision.reason) == ("eighth", DecisionReason.STATIC)

    @pytest.mark.parametrize(("goodput", "expected"), [(0.02 * GB, "lossless"), (20 * GB, "none")])
    def test_below_the_floor_the_better_lossless_goes(self, goodput: float, expected: str) -> None:
        decision = self.static("eighth").decide(question(floor=0.98, goodput=goodput), 0.0)
        assert (decision.chosen.profile, decision.reason) == (expected, DecisionReason.STATIC_BELOW_FLOOR)

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"^transfer\.policy: there is no profile 'ninth'; .* eighth"):
            self.static("ninth")
