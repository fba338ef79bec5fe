"""The door: what is promised against what is predicted, and when to come again."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RejectReason
from core.service_class import NO_SLO, ServiceClass, Slo
from router.admission.config import AdmissionConfig, ClassConfig, DoorMode
from router.admission.door import Door, Forecast
from router.admission.speed import QueueSpeed
from router.service_terms import ServiceTerms

CONFIG = AdmissionConfig(
    interactive=ClassConfig(tolerance_ratio=0.1),
    deadline=ClassConfig(door=DoorMode.OBSERVE, tolerance_ratio=0.0),
    batch=ClassConfig(door=DoorMode.OFF),
)
FORECAST = Forecast(
    gateway_wait_s=1.0,
    ttft_s=0.5,
    worker_wait_s=0.2,
    transfer_s=0.0,
    room_wait_s=0.0,
    tpot_s=0.05,
    output_tokens=101,
)


def terms(slo: Slo, service_class: ServiceClass = ServiceClass.INTERACTIVE) -> ServiceTerms:
    return ServiceTerms(service_class, 0, slo, "")


@pytest.mark.parametrize(
    ("slo", "reason", "retry_after_s"),
    [
        pytest.param(NO_SLO, None, None, id="nothing promised"),
        pytest.param(Slo(ttft_s=2.0, tpot_s=0.1, deadline_s=10.0), None, None, id="all met"),
        pytest.param(Slo(ttft_s=1.4), None, None, id="within the tolerance"),
        pytest.param(Slo(ttft_s=1.2), RejectReason.SLO_TTFT, 0.3, id="when as much has drained"),
        pytest.param(Slo(ttft_s=0.2), RejectReason.SLO_TTFT, 0.0, id="no waiting helps"),
        pytest.param(Slo(tpot_s=0.025), RejectReason.SLO_TPOT, 3.25, id="when half of such requests have ended"),
        pytest.param(Slo(deadline_s=5.9), RejectReason.DEADLINE, 0.6, id="the last token"),
        pytest.param(Slo(deadline_s=1.0), RejectReason.DEADLINE, 0.0, id="an answer of that length takes longer"),
        pytest.param(Slo(0.2, 0.025, 1.0), RejectReason.SLO_TTFT, 0.0, id="the first miss tells"),
    ],
)
def test_what_would_be_missed_is_refused(slo: Slo, reason: RejectReason | None, retry_after_s: float | None) -> None:
    verdict = Door(CONFIG).judge(terms(slo), FORECAST)
    assert verdict.ttft_s == pytest.approx(1.5)
    assert verdict.total_s == pytest.approx(6.5)
    assert verdict.is_enforced
    if reason is None:
        assert verdict.refusal is None
    else:
        assert verdict.refusal is not None
        assert verdict.refusal.reason is reason
        assert verdict.refusal.retry_after_s == pytest.approx(retry_after_s)


def test_the_deadline_counts_the_hand_off_and_the_wait_for_blocks() -> None:
    full = replace(FORECAST, transfer_s=0.5, room_wait_s=3.0)
    verdict = Door(CONFIG).judge(terms(Slo(ttft_s=1.5, deadline_s=8.0)), full)
    assert (verdict.ttft_s, verdict.total_s) == pytest.approx((1.5, 10.0))
    assert verdict.refusal is not None
    assert verdict.refusal.reason is RejectReason.DEADLINE
    assert verdict.refusal.retry_after_s == pytest.approx(2.0), "blocks become free: waiting helps"


def test_a_class_may_only_be_observed_or_left_alone() -> None:
    door, tight = Door(CONFIG), Slo(ttft_s=0.1)
    observed = door.judge(terms(tight, ServiceClass.DEADLINE), FORECAST)
    assert observed.refusal is not None
    assert not observed.is_enforced
    assert door.judge(terms(tight, ServiceClass.BATCH), FORECAST).refusal is None
    assert door.needs_forecast(terms(tight))
    assert door.needs_forecast(terms(tight, ServiceClass.DEADLINE))
    assert not door.needs_forecast(terms(tight, ServiceClass.BATCH))
    assert not door.needs_forecast(terms(NO_SLO))


SECONDS = st.floats(0.0, 1e4)


@given(
    slo=st.builds(Slo, *[st.none() | st.floats(1e-3, 1e4)] * 3),
    forecast=st.builds(Forecast, *[SECONDS] * 6, st.integers(1, 10_000)),
    longer=st.floats(0.0, 100.0),
)
def test_more_waiting_never_opens_the_door(slo: Slo, forecast: Forecast, longer: float) -> None:
    door = Door(CONFIG)
    now = door.judge(terms(slo), forecast)
    later = door.judge(terms(slo), replace(forecast, gateway_wait_s=forecast.gateway_wait_s + longer))
    assert now.refusal is None or later.refusal is not None
    if now.refusal is not None:
        assert 0.0 <= now.refusal.retry_after_s <= CONFIG.max_retry_after_s
        assert math.isfinite(now.refusal.retry_after_s)


def test_after_the_hinted_time_the_door_is_open_if_nobody_else_came() -> None:
    door, slo = Door(CONFIG), terms(Slo(ttft_s=1.2))
    refusal = door.judge(slo, FORECAST).refusal
    assert refusal is not None
    drained = replace(FORECAST, gateway_wait_s=FORECAST.gateway_wait_s - refusal.retry_after_s)
    assert door.judge(slo, drained).refusal is None


# --- how fast the queue drains ----------------------------------------------------------------------------------------


def test_the_speed_is_that_of_the_time_under_backlog() -> None:
    rate = QueueSpeed(10.0)
    assert rate.wait_s(100) is None
    for second in range(1, 41):
        is_backlogged = second % 2 == 0
        rate.pass_time(float(second), is_backlogged=is_backlogged)
        if is_backlogged:
            rate.accepted(300, float(second))
    assert rate.wait_s(600) == pytest.approx(2.0, rel=0.2), "300 in each busy second; the idle ones do not count"


def test_the_window_slides() -> None:
    rate = QueueSpeed(10.0)
    for second in range(1, 101):
        rate.pass_time(float(second), is_backlogged=True)
        rate.accepted(100 if second <= 50 else 400, float(second))
    assert rate.wait_s(4000) == pytest.approx(10.0, rel=0.1), "at the latest speed"
    rate.pass_time(200.0, is_backlogged=False)
    assert rate.wait_s(4000) is None, "all of that is long past"


def test_a_stalled_queue_takes_at_least_as_long_as_it_has_stalled() -> None:
    rate = QueueSpeed(10.0)
    for second in range(1, 9):
        rate.pass_time(float(second), is_backlogged=True)
    wait_s = rate.wait_s(1)
    assert wait_s is not None
    assert wait_s >= 7.0 - 1e-9


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.booleans(), st.integers(0, 1000)), max_size=100))
def test_the_speed_keeps_few_slices_and_finite_numbers(steps: list[tuple[float, bool, int]]) -> None:
    rate, now = QueueSpeed(10.0), 0.0
    for seconds, is_backlogged, num_tokens in steps:
        now += seconds
        rate.pass_time(now, is_backlogged=is_backlogged)
        if is_backlogged:
            rate.accepted(num_tokens, now)
        wait_s = rate.wait_s(100)
        assert wait_s is None or 0.0 <= wait_s < math.inf
    assert rate.num_slices <= 21
