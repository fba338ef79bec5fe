"""Head shards: who brings what, under which id, and when a request has landed."""

import itertools
from dataclasses import replace

import pytest

from core.ids import TransferId
from kv_transfer.ports import LandedStats
from kv_transfer.session import NackReason
from kv_transfer.shards import ShardsFailed, ShardsLanded, ShardTally, common_heads, shard_heads, shard_id

A, B, C = (TransferId(f"r/0#h{first}-{first + 1}") for first in range(3))


def _stats(exposed_s: float = 1.0, profile: str = "x4", *, is_lossless: bool = True) -> LandedStats:
    return LandedStats(2, 100, 4, exposed_s + 1, exposed_s, 60, profile, is_lossless)


@pytest.mark.parametrize(("senders", "receivers"), list(itertools.product([1, 2, 4, 8], repeat=2)))
def test_every_head_is_brought_once(senders: int, receivers: int) -> None:
    shards = [
        heads
        for sender in shard_heads(8, senders)
        for receiver in shard_heads(8, receivers)
        if (heads := common_heads(sender, receiver)) is not None
    ]
    assert sorted(head for heads in shards for head in heads) == list(range(8))
    assert len({shard_id(TransferId("r/0"), heads, 8) for heads in shards}) == len(shards) == max(senders, receivers)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="6 heads"):
        shard_heads(6, 4)


def test_the_id_of_all_heads_is_the_transfers_own() -> None:
    assert shard_id(TransferId("r/0"), range(8), 8) == "r/0"
    assert shard_id(TransferId("r/0"), range(2, 4), 8) == "r/0#h2-4"


def test_a_request_has_landed_when_its_last_shard_has() -> None:
    tally = ShardTally([A, B])
    tally.landed(A, 7, _stats(1.0))
    tally.landed(A, 7, _stats(9.0))  # said again
    assert not tally.verdict
    tally.landed(B, 7, _stats(3.0, "none", is_lossless=False))
    assert tally.verdict == ShardsLanded(7, LandedStats(4, 200, 4, 4.0, 3.0, 120, "mixed", False))
    assert tally.to_cancel == frozenset()


def test_the_first_failure_is_the_requests_and_the_rest_is_waited_for() -> None:
    tally = ShardTally([A, B, C])
    tally.landed(A, 7, _stats())
    tally.failed(B, NackReason.CHECKSUM, "damaged")
    assert not tally.verdict
    assert tally.to_cancel == {C}
    tally.failed(C, NackReason.CANCELLED, "the request is lost")
    assert tally.verdict == ShardsFailed(NackReason.CHECKSUM, f"{B}: damaged")


def test_shards_that_disagree_on_the_first_token_have_failed() -> None:
    tally = ShardTally([A, B])
    tally.landed(A, 7, _stats())
    tally.landed(B, 8, _stats())
    assert isinstance(tally.verdict, ShardsFailed)
    assert tally.verdict.reason == NackReason.PROTOCOL


def test_tokens_that_all_shards_left_out_are_told() -> None:
    tally = ShardTally([A, B])
    for shard in (A, B):
        tally.landed(shard, 7, replace(_stats(is_lossless=False), dropped_tokens=5))
    verdict = tally.verdict
    assert isinstance(verdict, ShardsLanded)
    assert verdict.stats.dropped_tokens == 5


def test_shards_that_left_out_unequal_numbers_of_tokens_are_no_prompt() -> None:
    tally = ShardTally([A, B])
    tally.landed(A, 7, replace(_stats(is_lossless=False), dropped_tokens=5))
    tally.landed(B, 7, _stats())
    verdict = tally.verdict
    assert isinstance(verdict, ShardsFailed)
    assert verdict.reason == NackReason.PROTOCOL
