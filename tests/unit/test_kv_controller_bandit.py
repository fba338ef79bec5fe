"""What the controller learns, from whom, and how it forgets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.controller.bandit import NOISE_VARIANCE, PRIOR_VARIANCES, SURPRISE, Cause, Experience, Key
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.model import predict
from kv_transfer.controller.policy import place
from tests.fakes.arms import ARMS, GB, LOSSLESS, MB, NONE, PIPELINE, outcome, policy, question

CODEC, WIRE, REST = Key("codec", "", "eighth"), Key("wire", "tcp"), Key("rest", "tcp", "eighth", 3, 4)


def experience(knowledge_s: float = 1e6, max_contexts: int = 100, ttl_s: float = 1e6) -> Experience:
    return Experience(knowledge_s=knowledge_s, max_contexts=max_contexts, context_ttl_s=ttl_s)


def test_the_doubtful_and_involved_cause_gets_the_most_of_it() -> None:
    known = experience()
    causes = [Cause(CODEC, 1.0), Cause(WIRE, 0.0), Cause(REST, 1.0)]
    assert known.learn("tcp", 0.5, NOISE_VARIANCE, causes, 0.0)
    codec, rest = known.believe(CODEC, 0.0)[0], known.believe(REST, 0.0)[0]
    assert codec / rest == pytest.approx(PRIOR_VARIANCES["codec"] / PRIOR_VARIANCES["rest"])
    assert 0.0 < codec + rest < 0.5
    assert known.believe(WIRE, 0.0) == (0.0, PRIOR_VARIANCES["wire"])


@given(st.lists(st.floats(-5.0, 5.0), max_size=40), st.floats(0.0, 2.0), st.floats(0.0, 2.0))
def test_doubt_only_shrinks_and_never_ends(log_ratios: list[float], codec: float, wire: float) -> None:
    known = experience()
    before = PRIOR_VARIANCES["codec"]
    for log_ratio in log_ratios:
        known.learn("tcp", log_ratio, NOISE_VARIANCE, [Cause(CODEC, codec), Cause(WIRE, wire)], 0.0)
        after = known.believe(CODEC, 0.0)[1]
        assert 0.0 < after <= before
        before = after


@pytest.mark.parametrize("truth", [-0.7, -0.1, 0.4, 0.9])
def test_repeated_news_are_believed(truth: float) -> None:
    known = experience()
    for _ in range(100):
        believed = known.believe(CODEC, 0.0)[0]
        known.learn("tcp", truth - believed, NOISE_VARIANCE, [Cause(CODEC, 1.0)], 0.0)
    assert known.believe(CODEC, 0.0)[0] == pytest.approx(truth, abs=0.03)


def test_a_surprise_counts_only_when_it_is_confirmed() -> None:
    known, causes = experience(), [Cause(REST, 1.0)]
    far = SURPRISE * 2
    assert not known.learn("tcp", far, NOISE_VARIANCE, causes, 0.0)
    assert known.believe(REST, 0.0)[0] == 0.0
    assert not known.learn("tcp", -far, NOISE_VARIANCE, causes, 0.0)  # contradicted
    assert not known.learn("gloo", -far, NOISE_VARIANCE, causes, 0.0)  # elsewhere
    assert known.learn("tcp", -far, NOISE_VARIANCE, causes, 0.0)
    assert -far < known.believe(REST, 0.0)[0] < 0.0
    assert known.learn("tcp", 0.0, NOISE_VARIANCE, causes, 0.0)
    assert not known.learn("tcp", -far, NOISE_VARIANCE, causes, 0.0)  # forgotten


def test_experience_fades() -> None:
    known = experience(knowledge_s=100.0)
    known.learn("tcp", 0.5, NOISE_VARIANCE, [Cause(CODEC, 1.0)], 0.0)
    mean, variance = known.believe(CODEC, 0.0)
    later_mean, later_variance = known.believe(CODEC, 100.0)
    assert later_mean == pytest.approx(mean / math.e)
    assert variance < later_variance < PRIOR_VARIANCES["codec"]
    assert known.believe(CODEC, 1e5) == pytest.approx((0.0, PRIOR_VARIANCES["codec"]))


def test_experience_is_bounded_in_number_and_in_age() -> None:
    known = experience(max_contexts=3, ttl_s=50.0)
    keys = [Key("rest", "tcp", "eighth", 0, size) for size in range(5)]
    for at_s, key in enumerate(keys):
        known.learn_directly(key, 0.1, 0.01, float(at_s))
    assert [key for key, _ in known.beliefs()] == keys[2:]
    known.learn_directly(keys[2], 0.1, 0.01, 5.0)
    known.evict(54.5)
    assert [key for key, _ in known.beliefs()] == [keys[2]]


# --- through the policy -----------------------------------------------------------------------------------------------


def times_of(name: str, goodput: float, codec_factor: float = 1.0) -> float:
    asked = question(goodput=goodput)
    where = place(asked, ControllerConfig(), PIPELINE, goodput_bytes_per_s=goodput, compute_s=0.0)
    (one,) = [candidate for candidate in ARMS if candidate.name == name]
    return predict(one, where.situation, codec_factor).total_s


def test_a_codec_that_is_slow_here_is_left_and_known_to_be_slow_on_other_links_too() -> None:
    subject, goodput = policy(), 0.02 * GB
    quick = 0.1 * GB
    assert subject.decide(question("before", goodput=quick), 0.0).chosen.profile == "eighth"
    for idx in range(20):
        asked = question(f"{idx}", goodput=goodput)
        decision = subject.decide(asked, float(idx))
        name = decision.chosen.profile
        subject.learn(
            decision,
            outcome(asked, times_of(name, goodput, 6.0 if name == "eighth" else 1.0), ratio=_ratio(name)),
            float(idx),
        )
    elsewhere = subject.decide(question("after", goodput=quick, carrier="gloo", peer="decode-1"), 60.0)
    eighth = next(one for one in elsewhere.candidates if one.profile == "eighth")
    assert eighth.codec_factor > 1.25


def test_what_was_learned_of_a_profile_does_not_stretch_the_queue_in_front_of_it() -> None:
    subject, slow = policy((NONE, LOSSLESS)), 0.002 * GB
    for idx in range(20):  # a tenth slower than told, and with a poorer ratio
        asked = question(f"{idx}", raw_bytes=2 * MB, goodput=slow, floor=1.0)
        decision = subject.decide(asked, float(idx))
        assert decision.chosen.profile == "lossless"
        subject.learn(decision, outcome(asked, 0.79, ratio=1.35), float(idx))
    behind = question("behind", raw_bytes=2 * MB, goodput=slow, floor=1.0, queued_bytes=20 * MB, peer="decode-1")
    decision = subject.decide(behind, 20.0)
    assert decision.chosen.profile == "lossless"
    predicted = {one.profile: one.predicted_s for one in decision.candidates}
    alone = subject.decide(question("alone", raw_bytes=2 * MB, goodput=slow, floor=1.0, peer="decode-2"), 20.0)
    saved = {one.profile: one.predicted_s for one in alone.candidates}
    assert predicted["none"] - predicted["lossless"] == pytest.approx(saved["none"] - saved["lossless"], abs=0.05)


def test_none_learns_too() -> None:
    subject, goodput = policy(), 20 * GB
    asked = [question(f"{idx}", goodput=goodput) for idx in range(30)]
    for one in asked:
        decision = subject.decide(one, 0.0)
        if decision.chosen.profile != "none":
            break
        subject.learn(decision, outcome(one, times_of("none", goodput) * 2.5, ratio=1.0), 0.0)
    after = subject.decide(question("after", goodput=goodput), 0.0)
    none = next(one for one in after.candidates if one.profile == "none")
    assert none.predicted_s > 1.5 * times_of("none", goodput)


@pytest.mark.parametrize("change", [50.0, 1 / 50.0])
def test_a_new_bandwidth_is_followed_by_the_goodput_and_blamed_on_nobody(change: float) -> None:
    subject, before = policy(), 0.4 * GB
    after = before / change
    for idx in range(30):
        asked = question(f"{idx}", goodput=before)
        decision = subject.decide(asked, float(idx))
        observed_s = times_of(decision.chosen.profile, before)
        subject.learn(decision, outcome(asked, observed_s, ratio=_ratio(decision.chosen.profile)), float(idx))
    learned = subject.experience.beliefs()
    asked = question("the first one after it", goodput=before)
    decision = subject.decide(asked, 31.0)
    observed_s = times_of(decision.chosen.profile, after)
    subject.learn(decision, outcome(asked, observed_s, ratio=_ratio(decision.chosen.profile), goodput=after), 31.0)
    for key, belief in learned:
        assert subject.experience.believe(key, 31.0)[0] == pytest.approx(belief.mean, abs=0.05), key
    fresh = policy().decide(question("x", goodput=after), 0.0).chosen.profile
    assert subject.decide(question("next", goodput=after, peer="another"), 32.0).chosen.profile == fresh


def test_a_goodput_that_lags_behind_is_not_believed_over_the_link_at_once() -> None:
    subject, before = policy(), 0.4 * GB
    asked = question("a", goodput=before)
    decision = subject.decide(asked, 0.0)
    late_s = times_of(decision.chosen.profile, before / 50)
    subject.learn(decision, outcome(asked, late_s, ratio=_ratio(decision.chosen.profile)), 0.0)
    assert {key.kind for key, belief in subject.experience.beliefs() if belief.mean} <= {"ratio"}


def test_the_prefill_that_took_longer_than_expected_teaches_nothing() -> None:
    subject = policy()
    asked = question("a", goodput=0.15 * GB, compute_s=0.5)
    decision = subject.decide(asked, 0.0)
    assert decision.chosen.profile == "none"
    expected_s = decision.chosen.predicted_s - 0.5
    subject.learn(decision, outcome(asked, 2.0 + expected_s, ratio=1.0, exposed_s=expected_s), 0.0)
    assert max(abs(belief.mean) for _, belief in subject.experience.beliefs()) < 0.02


def test_a_prefill_that_ended_before_the_reservation_is_no_transfer_time() -> None:
    subject = policy()
    asked = question("a", goodput=20 * GB)
    decision = subject.decide(asked, 0.0)
    expected_s = decision.chosen.predicted_s
    subject.learn(decision, outcome(asked, expected_s, ratio=1.0, exposed_s=expected_s + 7.0), 0.0)
    assert max(abs(belief.mean) for _, belief in subject.experience.beliefs()) < 1e-6


def test_the_ratio_that_is_achieved_replaces_the_one_of_the_profile() -> None:
    subject, goodput = policy(), 0.002 * GB
    for idx in range(20):
        asked = question(f"{idx}", goodput=goodput)
        decision = subject.decide(asked, 0.0)
        ratio = 3.0 if decision.chosen.profile == "eighth" else _ratio(decision.chosen.profile)
        observed_s = asked.raw_bytes / ratio / goodput
        subject.learn(decision, outcome(asked, observed_s, ratio=ratio), 0.0)
    assert subject.decide(question("z", goodput=goodput), 0.0).chosen.profile == "quarter"


def _ratio(name: str) -> float:
    return next(one.ratio for one in ARMS if one.name == name)
