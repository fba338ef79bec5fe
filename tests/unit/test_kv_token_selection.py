"""Which tokens are handed over when not all are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.token_selection import TokenSelection


@given(
    num_tokens=st.integers(1, 200),
    held_share=st.floats(0, 0.99),
    keep=st.floats(0.05, 0.95),
    sinks=st.integers(0, 8),
    recent=st.integers(0, 50),
    seed=st.integers(0, 100),
)
def test_keeps_the_budget_in_order_and_past_what_is_held(
    num_tokens: int, held_share: float, keep: float, sinks: int, recent: int, seed: int
) -> None:
    held = int(num_tokens * held_share)
    scores = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed))
    selection = TokenSelection(keep, sinks, recent)
    kept = selection.select(scores, held).tolist()
    assert len(kept) == selection.num_kept(num_tokens - held)
    assert kept == sorted(set(kept))
    assert all(held <= position < num_tokens for position in kept)
    assert set(range(max(held, num_tokens - recent), num_tokens)) <= set(kept), "the recent window is always there"
    free = [p for p in range(held, num_tokens) if sinks <= p < num_tokens - recent]
    dropped = [scores[p].item() for p in free if p not in kept]
    taken = [scores[p].item() for p in free if p in kept]
    assert not dropped or not taken or min(taken) >= max(dropped), "no dropped token scores more than a kept one"


def test_sinks_are_kept_whatever_their_score() -> None:
    scores = torch.arange(100.0)
    assert TokenSelection(0.5, sink_tokens=4, recent_tokens=8).select(scores, 0)[:4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_tokens", [1, 5, 31])
def test_a_short_prompt_is_sent_whole(num_tokens: int) -> None:
    assert len(TokenSelection(0.1, recent_tokens=32).select(torch.rand(num_tokens), 0)) == num_tokens


def test_equal_scores_keep_the_later_tokens() -> None:
    assert TokenSelection(0.3, sink_tokens=0, recent_tokens=0).select(torch.zeros(10), 0).tolist() == [7, 8, 9]
