"""The scheduler's decisions, and the life of a sequence."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidTransition
from core.ids import RequestId
from core.request import Finish, FinishReason, GenerateRequest, SamplingParams
from core.text import IncrementalDetokenizer
from engine.policy import admission_headroom, choose_victims, share_budget
from engine.sampler import SamplingState
from engine.sequence import EDGES, SequenceEvent, SequenceState, TokenSequence
from engine.stops import StopChecker, TextStops
from tests.state_tables import reach


@pytest.mark.parametrize(
    ("pending", "budget", "shares"),
    [
        ([1, 1, 1], 8, [1, 1, 1]),
        ([1, 1, 1], 3, [1, 1, 1]),
        ([100, 1, 1], 8, [6, 1, 1]),
        ([3, 100, 1, 50], 8, [3, 4, 1, 0]),
        ([3, 4], 8, [3, 4]),
        ([], 8, []),
        ([9, 9], 9, [9, 0]),
    ],
    ids=["decodes", "decodes-fill-it", "decodes-first", "oldest-prompt-first", "all-fit", "none", "exact"],
)
def test_share_budget(pending: list[int], budget: int, shares: list[int]) -> None:
    assert share_budget(pending, budget) == shares


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(12, 64))
def test_the_budget_is_used_and_kept(pending: list[int], budget: int) -> None:
    shares = share_budget(pending, budget)
    assert sum(shares) == min(sum(pending), budget)
    assert all(0 <= share <= tokens for share, tokens in zip(shares, pending, strict=True))
    assert all(share == 1 for share, tokens in zip(shares, pending, strict=True) if tokens == 1)
    if any(tokens > 1 for tokens in pending) and len(pending) <= budget:
        first = next(at for at, tokens in enumerate(pending) if tokens > 1)
        assert shares[first] >= 1, "the oldest prompt gets on in every step"


@pytest.mark.parametrize(
    ("missing", "held", "can_yield", "available", "victims"),
    [
        ([1, 1], [5, 5], [True, True], 2, []),
        ([1, 1], [5, 5], [True, True], 1, [1]),
        ([1, 0, 0], [5, 1, 2], [True, True, True], 0, [2]),
        ([1, 0], [5, 9], [True, False], 0, [0]),
        ([3, 0, 0], [5, 1, 2], [True, True, True], 0, [2, 1]),
        ([1, 0, 0], [5, 4, 0], [True, True, True], 0, [2, 1]),
    ],
    ids=["enough", "itself", "youngest", "only-one-that-can", "several", "gains-nothing"],
)
def test_choose_victims(
    missing: list[int], held: list[int], can_yield: list[bool], available: int, victims: list[int]
) -> None:
    assert choose_victims(missing, held, can_yield, available) == victims


def test_a_lone_request_may_have_every_block() -> None:
    assert admission_headroom(0) == 0


def make_sequence(state: SequenceState) -> TokenSequence:
    params = SamplingParams()
    return TokenSequence(
        GenerateRequest(RequestId("r"), (1, 2, 3), params),
        arrival=1,
        state=state,
        block_size=2,
        max_tokens=9,
        namespace=b"root",
        sampling=SamplingState(params, (1, 2, 3), ()),
        stops=StopChecker(params, max_new_tokens=6, end_token_ids=()),
    )


@pytest.mark.parametrize("state", SequenceState)
@pytest.mark.parametrize("event", SequenceEvent)
def test_every_state_and_event_is_an_edge_or_refused(state: SequenceState, event: SequenceEvent) -> None:
    sequence = make_sequence(state)
    if event in EDGES[state]:
        sequence.handle(event)
        assert sequence.state is EDGES[state][event]
    else:
        with pytest.raises(InvalidTransition):
            sequence.handle(event)
        assert sequence.state is state


def test_every_state_is_reached_and_ends() -> None:
    assert reach(EDGES, SequenceState.RESERVED) | reach(EDGES, SequenceState.UNREADY) == set(SequenceState)
    assert all(SequenceEvent.ENDED in EDGES[state] for state in SequenceState if state is not SequenceState.ENDED)


def letters(token_ids: object) -> str:
    return "".join(map(chr, token_ids))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("text", "params", "end", "finish"),
    [
        ("abcdef", SamplingParams(max_tokens=4), 4, Finish(FinishReason.LENGTH)),
        ("abcdef", SamplingParams(max_tokens=9, stop=("cd",)), 4, Finish(FinishReason.STOP, "cd")),
        ("abcdef", SamplingParams(max_tokens=4, stop=("cd",)), 4, Finish(FinishReason.STOP, "cd")),
        ("abcdef", SamplingParams(max_tokens=9, stop_token_ids=(ord("b"),)), 2, Finish(FinishReason.STOP, ord("b"))),
        ("ab", SamplingParams(max_tokens=9, stop=("xa",)), None, None),
    ],
    ids=["length", "stop-across-tokens", "stop-beats-length", "stop-token", "prompt-is-not-searched"],
)
def test_stops(text: str, params: SamplingParams, end: int | None, finish: Finish | None) -> None:
    stops = StopChecker(
        params,
        max_new_tokens=params.max_tokens,
        end_token_ids=params.stop_token_ids,
        text=TextStops(partial(IncrementalDetokenizer, letters), [ord("x")]) if params.stop else None,
    )
    for at, letter in enumerate(text, start=1):
        found = stops.push(ord(letter))
        if at == end:
            assert found == finish
            return
        assert found is None
    assert end is None
