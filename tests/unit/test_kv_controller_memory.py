"""The chooser as the sender meets it: answers, outcomes, the ring, the metrics, and a restart."""

import asyncio
import json
import logging

import pytest
from prometheus_client import CollectorRegistry

from core.clock import Clock, ManualClock
from core.errors import ConfigError
from core.store_memory import MemoryStore
from kv_transfer.choice import TransferObservation
from kv_transfer.codecs.ladder import ladder
from kv_transfer.config import KvTransferConfig
from kv_transfer.controller.arms import Arm, arms_of
from kv_transfer.controller.chooser import Chooser
from kv_transfer.controller.keeper import MemoryKeeper
from kv_transfer.controller.metrics import ControllerMetrics
from kv_transfer.controller.opening import open_chooser
from kv_transfer.controller.static_policy import StaticPolicy
from kv_transfer.profile import CodecTime, Profile, Quality
from kv_transfer.session import NackReason
from tests.fakes.arms import ARMS, GB, NONE, PIPELINE, arm, outcome, policy, question

KEY = "kv_controller/cluster/prefill"


class StepClock:
    """Ten seconds later whenever it is asked: nobody queues behind anybody."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        self._now_s += 10.0
        return self._now_s


def chooser(
    registry: CollectorRegistry | None = None, *, max_decisions: int = 8, arms: tuple[Arm, ...] = ARMS
) -> Chooser:
    clock: Clock = StepClock()
    return Chooser(policy(arms), clock, ControllerMetrics(registry or CollectorRegistry()), max_decisions)


def teach(subject: Chooser, observed_s: float = 0.3, num: int = 20) -> None:
    """Let everything take twice as long as the model says of the best."""
    for idx in range(num):
        asked = question(f"lesson {idx}", goodput=0.02 * GB)
        choice = subject.choose(asked)
        ratio = next(one.ratio for one in ARMS if one.name == choice.profile)
        subject.observe(outcome(asked, observed_s, ratio=ratio))


def prediction(subject: Chooser) -> float:
    """Return what is predicted of one more, which does not take place."""
    asked = question("probe", goodput=0.02 * GB)
    choice = subject.choose(asked)
    subject.observe(outcome(asked, 0.0, ratio=1.0, failure=NackReason.CANCELLED))
    assert choice.predicted_s is not None
    return choice.predicted_s


def test_decisions_are_told_with_their_terms_and_outcomes() -> None:
    subject = chooser()
    asked = question("t1", goodput=0.02 * GB)
    choice = subject.choose(asked)
    subject.observe(outcome(asked, 0.25, ratio=8.0))
    subject.choose(question("t2", goodput=0.02 * GB))
    newest, older = json.loads(json.dumps(subject.decisions()))
    assert (newest["transfer_id"], newest["outcome"]) == ("t2", None)
    assert older["profile"] == choice.profile == "eighth"
    assert older["reason"] == choice.reason == "fastest"
    assert older["predicted_s"] == choice.predicted_s
    assert older["outcome"]["observed_s"] == 0.25
    assert older["outcome"]["ratio"] == 8.0
    assert older["outcome"]["regret_s"] >= 0.0
    assert "none" in [one["profile"] for one in older["candidates"]]
    assert {"encode_s", "wire_s", "decode_s", "crowding_s", "model_s", "doubt"} <= set(older["candidates"][0])


def test_the_ring_is_bounded_and_outcomes_of_what_left_it_still_teach() -> None:
    subject = chooser(max_decisions=2)
    asked = [question(f"t{idx}", goodput=0.02 * GB) for idx in range(4)]
    for one in asked:
        subject.choose(one)
    before = subject.experience_version
    subject.observe(outcome(asked[0], 0.2, ratio=8.0))
    assert subject.experience_version > before
    assert [one["transfer_id"] for one in subject.decisions()] == ["t3", "t2"]
    assert [one["transfer_id"] for one in subject.decisions(1)] == ["t3"]


def test_metrics_count_predictions_and_regret() -> None:
    registry = CollectorRegistry()
    subject = chooser(registry)
    teach(subject, num=3)
    observed = registry.get_sample_value("tandem_kv_transfer_observed_seconds_count", {"profile": "eighth"})
    assert observed == registry.get_sample_value("tandem_kv_transfer_predicted_seconds_count", {"profile": "eighth"})
    assert observed is not None
    assert observed >= 1
    assert registry.get_sample_value("tandem_kv_transfer_prediction_error_ratio_count") == 3
    assert registry.get_sample_value("tandem_kv_transfer_regret_seconds_total") is not None


def test_an_outcome_that_nobody_asked_for_is_told_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    chooser().observe(TransferObservation(question("stranger").transfer_id, 1.0, 1.0, 10, 10))
    assert "stranger" in caplog.text


def test_what_was_learned_survives_a_restart() -> None:
    first, second = chooser(), chooser()
    teach(first)
    assert prediction(first) > 1.5 * prediction(second)
    assert second.restore(first.snapshot())
    assert prediction(second) == pytest.approx(prediction(first), rel=0.05)


def damaged() -> dict[str, bytes]:
    first = chooser()
    teach(first)
    good = first.snapshot()
    data = json.loads(good)
    row = data["beliefs"][0]

    def with_row(*values: object) -> bytes:
        return json.dumps(data | {"beliefs": [[*row[: 8 - len(values)], *values]]}).encode()

    return {
        "empty": b"",
        "not json": b"\xff\x00",
        "cut": good[:-20],
        "a list": b"[]",
        "deep": b"[" * 100_000,
        "old version": json.dumps(data | {"version": 0}).encode(),
        "other profiles": json.dumps(data | {"arms": "0"}).encode(),
        "no beliefs": json.dumps({key: value for key, value in data.items() if key != "beliefs"}).encode(),
        "beliefs of another kind": json.dumps(data | {"beliefs": {"a": 1}}).encode(),
        "short row": json.dumps(data | {"beliefs": [row[:5]]}).encode(),
        "text for a number": with_row("0.1", 0.1, 1.0),
        "nan": with_row(float("nan"), 0.1, 1.0),
        "larger than any float": with_row(10**400, 0.1, 1.0),
        "mean out of range": with_row(50.0, 0.1, 1.0),
        "no doubt at all": with_row(0.1, 0.0, 1.0),
        "too much doubt": with_row(0.1, 99.0, 1.0),
        "from the future": with_row(0.1, 0.01, -5.0),
        "unknown kind": json.dumps(data | {"beliefs": [["mood", *row[1:]]]}).encode(),
        "huge": b" " * (5 << 20),
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_snapshot_is_ignored_and_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    subject = chooser()
    teach(subject)
    before = prediction(subject)
    assert not subject.restore(damaged()[name])
    assert "without experience" in caplog.text
    assert prediction(subject) == pytest.approx(before, rel=0.05)


def test_a_snapshot_of_other_measurements_is_ignored() -> None:
    first = chooser()
    teach(first)
    other = chooser(arms=(NONE, arm("eighth", 1, 8.0, 0.9 * GB, 0.972)))
    assert not other.restore(first.snapshot())


async def test_the_keeper_saves_what_is_new_and_loads_it_again() -> None:
    store, first, second = MemoryStore(), chooser(), chooser()
    keeper = MemoryKeeper(first, store, KEY, interval_s=3600.0)
    assert not await keeper.load()
    assert await keeper.save()
    assert await store.get(KEY) is None  # nothing was learned
    teach(first)
    assert await keeper.save()
    assert await MemoryKeeper(second, store, KEY, interval_s=3600.0).load()
    assert prediction(second) == pytest.approx(prediction(first), rel=0.05)
    await store.delete(KEY)
    assert await keeper.save()
    assert await store.get(KEY) is None  # nothing new


async def test_an_outage_of_the_store_is_told_and_made_up_for(caplog: pytest.LogCaptureFixture) -> None:
    store, subject = MemoryStore(), chooser()
    keeper = MemoryKeeper(subject, store, KEY, interval_s=3600.0)
    teach(subject)
    store.set_available(False)
    assert not await keeper.load()
    assert not await keeper.save()
    assert "was not saved" in caplog.text
    store.set_available(True)
    assert await keeper.save()
    assert await store.get(KEY) is not None


async def test_the_keeper_saves_on_its_pace() -> None:
    class Seen(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            self.saved = asyncio.Event()

        async def put(self, key: str, value: bytes, *, ttl_s: float | None = None) -> None:
            await super().put(key, value, ttl_s=ttl_s)
            self.saved.set()

    store, subject = Seen(), chooser()
    task = asyncio.create_task(MemoryKeeper(subject, store, KEY, interval_s=0.001).run())
    teach(subject)
    async with asyncio.timeout(10):
        await store.saved.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_static_chooser_has_nothing_to_keep() -> None:
    static = StaticPolicy(ARMS, "eighth", KvTransferConfig().controller, PIPELINE)
    subject = Chooser(static, ManualClock(), ControllerMetrics(CollectorRegistry()), 4)
    teach(subject)
    assert (subject.experience_version, subject.snapshot()) == (0, b"")
    assert not subject.restore(chooser().snapshot())


# --- composition ------------------------------------------------------------------------------------------------------


def library() -> list[Profile]:
    quality = Quality(
        agreement=0.98,
        agreement_low=0.975,
        agreement_high=0.985,
        kl=0.01,
        kl_low=0.005,
        kl_high=0.02,
        num_prompts=64,
        num_positions=2048,
        confidence=0.95,
    )
    time = CodecTime(fixed_s=1e-4, s_per_byte=1e-9)
    return [
        Profile(name=name, pipeline=spec, ratio=float(idx), encode=time, decode=time, quality=quality)
        for idx, (name, spec) in enumerate(ladder().items(), 1)
    ]


def test_profiles_become_arms_by_loss_with_none_first() -> None:
    def opened(spec: object) -> object:
        return ("encoder of", spec)

    arms = arms_of(library()[::-1], opened)  # type: ignore[arg-type]
    assert [one.name for one in arms][:2] == ["none", "lossless"]
    assert [one.loss_rank for one in arms] == list(range(len(library())))
    assert arms_of((), opened)[0].name == "none"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one name"):
        arms_of([*library(), library()[1]], opened)  # type: ignore[arg-type]


def test_a_chooser_is_opened_from_the_configuration(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    subject = open_chooser(KvTransferConfig(), library(), ManualClock(), seed=3, registry=CollectorRegistry())
    choice = subject.choose(question(goodput=0.001 * GB, floor=0.9))
    assert not choice.encoder.is_identity
    fixed = open_chooser(KvTransferConfig(policy="int8"), library(), ManualClock(), registry=CollectorRegistry())
    assert fixed.choose(question(floor=0.9)).profile == "int8"
    assert fixed.choose(question(floor=1.0)).encoder.is_lossless
    with pytest.raises(ConfigError, match=r"transfer\.policy"):
        open_chooser(KvTransferConfig(policy="x99"), library(), ManualClock(), registry=CollectorRegistry())
    bare = open_chooser(KvTransferConfig(), (), ManualClock(), registry=CollectorRegistry())
    assert bare.choose(question()).reason == "no_profiles"
