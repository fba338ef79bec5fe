"""What a prefill worker takes and refuses."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RejectReason
from core.membership import WorkerState
from prefill_workers.policy import PrefillAccounts, PrefillDemand, PrefillLimits, refusal

LIMITS = PrefillLimits(max_queued_tokens=1000, max_requests=4, max_model_len=2048, total_blocks=100, block_size=16)
IDLE = PrefillAccounts(WorkerState.READY, num_requests=0, queued_tokens=0, tokens_per_s=0.0)


BOUND = st.none() | st.integers(0, 2000)


@pytest.mark.parametrize(
    ("demand", "changes", "reason"),
    [
        pytest.param(PrefillDemand(10), {}, None, id="idle"),
        pytest.param(PrefillDemand(1600), {}, None, id="longer than the queue, but idle"),
        pytest.param(PrefillDemand(1601), {}, RejectReason.TOO_LONG, id="more than the pool"),
        pytest.param(PrefillDemand(10), {"queued_tokens": 990}, None, id="just fits the queue"),
        pytest.param(PrefillDemand(11), {"queued_tokens": 990}, RejectReason.QUEUE_FULL, id="queue full"),
        pytest.param(PrefillDemand(10), {"num_requests": 4}, RejectReason.QUEUE_FULL, id="too many requests"),
        pytest.param(PrefillDemand(10, max_queued_tokens=90), {"queued_tokens": 90}, None, id="as busy as thought"),
        pytest.param(PrefillDemand(10, max_queued_tokens=0), {}, None, id="idle as thought"),
        pytest.param(
            PrefillDemand(10, max_queued_tokens=89),
            {"queued_tokens": 90},
            RejectReason.BUSIER,
            id="busier than thought",
        ),
        pytest.param(
            PrefillDemand(11, max_queued_tokens=0), {"queued_tokens": 990}, RejectReason.QUEUE_FULL, id="full first"
        ),
        pytest.param(PrefillDemand(10, is_known=True), {}, RejectReason.DUPLICATE, id="known"),
        pytest.param(PrefillDemand(10), {"state": WorkerState.DRAINING}, RejectReason.DRAINING, id="draining"),
        pytest.param(PrefillDemand(10), {"state": WorkerState.STOPPED}, RejectReason.DRAINING, id="stopped"),
        pytest.param(PrefillDemand(10), {"state": WorkerState.LOADING}, RejectReason.NOT_READY, id="loading"),
    ],
)
def test_refusal(demand: PrefillDemand, changes: dict[str, object], reason: RejectReason | None) -> None:
    error = refusal(demand, dataclasses.replace(IDLE, **changes), LIMITS)  # type: ignore[arg-type]
    assert (error.reason if error else None) == reason


def test_a_model_shorter_than_the_pool_bounds_the_prompt() -> None:
    limits = dataclasses.replace(LIMITS, max_model_len=64)
    assert refusal(PrefillDemand(63), IDLE, limits) is None
    error = refusal(PrefillDemand(64), IDLE, limits)
    assert error is not None
    assert error.reason is RejectReason.TOO_LONG


def test_a_full_queue_says_when_to_come_back() -> None:
    busy = PrefillAccounts(WorkerState.READY, num_requests=1, queued_tokens=1000, tokens_per_s=500.0)
    error = refusal(PrefillDemand(100), busy, LIMITS)
    assert error is not None
    assert error.retry_after_s == pytest.approx(0.2)


@given(st.integers(1, 3000), st.integers(0, 8), st.integers(0, 2000), st.sampled_from(WorkerState), BOUND)
def test_more_load_never_opens_a_closed_door(
    prompt: int, num: int, queued: int, state: WorkerState, bound: int | None
) -> None:
    before = PrefillAccounts(state, num, queued, 1.0)
    after = PrefillAccounts(state, num + 1, queued + 16, 1.0)
    demand = PrefillDemand(prompt, max_queued_tokens=bound)
    if refusal(demand, before, LIMITS) is not None:
        assert refusal(demand, after, LIMITS) is not None
