"""What a decode worker takes and refuses."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RejectReason
from core.membership import WorkerState
from decode_workers.policy import DecodeAccounts, DecodeDemand, DecodeLimits, Terms, refusal

LIMITS = DecodeLimits(max_requests=4, max_model_len=2048, total_blocks=100, block_size=16)
BUSY = DecodeAccounts(WorkerState.READY, num_requests=1, free_blocks=20, queued_tokens=50, step_s=0.02)


TERMS = st.builds(Terms, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))


@pytest.mark.parametrize(
    ("demand", "changes", "reason"),
    [
        pytest.param(DecodeDemand(10), {}, None, id="room"),
        pytest.param(DecodeDemand(1000), {}, None, id="perhaps most of it is cached: the engine knows"),
        pytest.param(DecodeDemand(10), {"free_blocks": 0}, RejectReason.NO_BLOCKS, id="nothing free"),
        pytest.param(DecodeDemand(1599), {"num_requests": 0, "free_blocks": 100}, None, id="all of an idle pool"),
        pytest.param(DecodeDemand(1600), {"num_requests": 0}, RejectReason.TOO_LONG, id="more than the pool"),
        pytest.param(DecodeDemand(2048), {}, RejectReason.TOO_LONG, id="more than the model"),
        pytest.param(DecodeDemand(10), {"num_requests": 4}, RejectReason.QUEUE_FULL, id="too many requests"),
        pytest.param(DecodeDemand(10, terms=Terms(50, 1)), {}, None, id="as busy as the gateway thought"),
        pytest.param(DecodeDemand(10, terms=Terms(49)), {}, RejectReason.BUSIER, id="more to compute"),
        pytest.param(DecodeDemand(10, terms=Terms(None, 0)), {}, RejectReason.BUSIER, id="more requests"),
        pytest.param(DecodeDemand(10, terms=Terms(0, 0)), {"num_requests": 0, "queued_tokens": 0}, None, id="idle"),
        pytest.param(
            DecodeDemand(10, terms=Terms(0, 0)), {"num_requests": 4}, RejectReason.QUEUE_FULL, id="full first"
        ),
        pytest.param(DecodeDemand(10, is_known=True), {}, RejectReason.DUPLICATE, id="known"),
        pytest.param(DecodeDemand(10), {"state": WorkerState.DRAINING}, RejectReason.DRAINING, id="draining"),
        pytest.param(DecodeDemand(10), {"state": WorkerState.LOADING}, RejectReason.NOT_READY, id="loading"),
    ],
)
def test_refusal(demand: DecodeDemand, changes: dict[str, object], reason: RejectReason | None) -> None:
    error = refusal(demand, dataclasses.replace(BUSY, **changes), LIMITS)  # type: ignore[arg-type]
    assert (error.reason if error else None) == reason


@given(st.integers(1, 3000), st.integers(1, 8), st.integers(0, 100), st.sampled_from(WorkerState), TERMS)
def test_more_load_never_opens_a_closed_door(
    prompt: int, num: int, free: int, state: WorkerState, terms: Terms
) -> None:
    before = DecodeAccounts(state, num, free, 7, 0.01)
    after = DecodeAccounts(state, num + 1, max(0, free - 1), 8, 0.01)
    demand = DecodeDemand(prompt, terms=terms)
    if refusal(demand, before, LIMITS) is not None:
        assert refusal(demand, after, LIMITS) is not None
