"""The controller in a world that drifts: what the world is, and that the controller loses little against knowing it."""

import math
import random
from collections.abc import Sequence

import pytest

from benchmarks.kv_controller_replay import Job, Trace, Truth, replay, replay_oracle
from kv_transfer.choice import TransferTerms
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.controller import ControllerPolicy
from kv_transfer.controller.static_policy import StaticPolicy
from tests.fakes.arms import ARMS, EIGHTH, GB, MB, NONE, PIPELINE

CONFIG = ControllerConfig()
LOSSY = TransferTerms(quality_floor=0.9)
SLOW, FAST = 0.06 * GB, 3 * GB
STEPS = Trace([60.0 * idx for idx in range(6)], [FAST, SLOW, FAST, math.sqrt(SLOW * FAST), SLOW, FAST])


def jobs(seed: int, num: int, per_s: float, terms: TransferTerms = LOSSY) -> list[Job]:
    rng = random.Random(seed)
    made, at_s = [], 0.0
    for _ in range(num):
        at_s += rng.expovariate(per_s)
        raw_bytes = int(min(64 * MB, max(1 * MB, rng.lognormvariate(math.log(8 * MB), 0.8))))
        made.append(Job(at_s, raw_bytes, terms, rng.lognormvariate(0.0, 0.08), rng.lognormvariate(0.0, 0.08)))
    return made


def static(name: str, made: Sequence[Job], truth: Truth, arms: Sequence[Arm] = ARMS) -> float:
    return sum(replay(StaticPolicy(arms, name, CONFIG, PIPELINE), made, truth, PIPELINE))


def controlled(made: Sequence[Job], truth: Truth, seed: int = 1, config: ControllerConfig = CONFIG) -> float:
    return sum(replay(ControllerPolicy(ARMS, config, PIPELINE, random.Random(seed)), made, truth, PIPELINE))


def test_a_lone_transfer_takes_what_its_stages_take() -> None:
    truth = Truth(Trace((0.0,), (0.1 * GB,)), rtt_s=0.002, overhead_s=0.001)
    (seconds,) = replay(StaticPolicy((NONE,), "none", CONFIG, PIPELINE), [Job(5.0, 10 * MB, LOSSY)], truth, PIPELINE)
    assert seconds == pytest.approx(0.1 + 0.002 + 0.001)


def test_a_frame_goes_on_at_the_new_bandwidth() -> None:
    trace = Trace((0.0, 1.0, 2.0), (10.0, 1.0, 100.0))
    assert trace.delivered_at(0.5, 5.0) == 1.0
    assert trace.delivered_at(0.5, 5.5) == 1.5
    assert trace.delivered_at(0.5, 16.0) == pytest.approx(2.1)
    assert trace.delivered_at(7.0, 100.0) == 8.0


def test_transfers_queue_on_the_wire_and_codecs_are_shared() -> None:
    truth = Truth(Trace((0.0,), (0.1 * GB,)), {"eighth": 2.0}, rtt_s=0.0, overhead_s=0.0)
    both = [Job(1.0, 10 * MB, LOSSY), Job(1.0, 10 * MB, LOSSY)]
    first, second = replay(StaticPolicy(ARMS, "none", CONFIG, PIPELINE), both, truth, PIPELINE)
    assert [first, second] == pytest.approx([0.1, 0.2])
    first, second = replay(StaticPolicy(ARMS, "eighth", CONFIG, PIPELINE), both, truth, PIPELINE)
    core_s = 2.0 * (6 * EIGHTH.encode_fixed_s + 10 * MB * EIGHTH.encode_s_per_byte)
    assert second - first == pytest.approx(core_s / PIPELINE.codec_threads, rel=0.05)


def test_the_oracle_is_no_slower_than_any_profile() -> None:
    truth = Truth(STEPS, {"quarter": 1.7, "half": 0.6})
    made = [Job(10.0 * idx, 8 * MB, LOSSY) for idx in range(36)]  # far apart: each on its own
    oracle = replay_oracle(ARMS, made, truth, PIPELINE)
    for arm in ARMS:
        times = replay(StaticPolicy(ARMS, arm.name, CONFIG, PIPELINE), made, truth, PIPELINE)
        assert all(best <= time_s for best, time_s in zip(oracle, times, strict=True))


def test_floors_bind_the_oracle_too() -> None:
    truth = Truth(Trace((0.0,), (SLOW,)))
    exact = jobs(3, 10, 0.1, TransferTerms(quality_floor=1.0))
    assert sum(replay_oracle(ARMS, exact, truth, PIPELINE)) == pytest.approx(
        min(static(name, exact, truth) for name in ("none", "lossless")), rel=0.01
    )


def test_two_replays_are_the_same() -> None:
    truth, made = Truth(STEPS), jobs(5, 150, 2.0)
    assert controlled(made, truth) == controlled(made, truth)


@pytest.mark.parametrize("seed", range(3))
def test_on_jumps_of_fifty_the_controller_beats_every_static_profile(seed: int) -> None:
    rng = random.Random(seed)
    truth = Truth(STEPS, {arm.name: rng.lognormvariate(0.0, 0.4) for arm in ARMS})
    made = jobs(seed, 1000, 3.0)
    seconds = controlled(made, truth, seed)
    assert min(static(arm.name, made, truth) for arm in ARMS) > 1.05 * seconds
    assert seconds < 1.07 * sum(replay_oracle(ARMS, made, truth, PIPELINE))


@pytest.mark.parametrize("goodput", [SLOW, 0.4 * GB, FAST])
def test_on_a_steady_link_it_is_about_as_good_as_the_best_static_profile(goodput: float) -> None:
    truth = Truth(Trace((0.0,), (goodput,)), {"quarter": 1.5, "eighth": 0.7, "half": 1.2})
    made = jobs(11, 600, 2.0)
    assert controlled(made, truth) < 1.03 * min(static(arm.name, made, truth) for arm in ARMS)


def test_codecs_that_are_not_what_the_profiles_say_are_found_out() -> None:
    truth = Truth(Trace((0.0,), (0.1 * GB,)), {"eighth": 8.0, "quarter": 1.0, "half": 1.0})
    made = jobs(13, 500, 2.0)
    believing = static("eighth", made, truth)  # what the profiles recommend
    assert controlled(made, truth) < 0.5 * believing
    assert controlled(made, truth) < 1.06 * static("quarter", made, truth)
