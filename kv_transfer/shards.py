"""Transfers of head shards: one request, several senders or several receivers, each with a part of the heads.

A tensor-parallel worker is several ranks, each with the KV of some heads. Every (sender rank, receiver rank) pair whose
heads meet is one transfer of its own over `offer(heads=...)` and `expect(heads=...)`, with its own session and outcome.
Its id is derived, so that both sides find it without talking: ``<id>#h<first>-<last>``, heads global and half-open;
the transfer of all heads keeps the id as it is. The owner counts the outcomes in with a `ShardTally`.

Frames and sessions know of shards, the engine has no tensor parallelism yet: so far only tests own some. Kept here,
since it is the half of that contract that both kinds of worker will have to share.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from core.ids import TransferId
from kv_transfer.ports import LandedStats
from kv_transfer.session import NackReason


def shard_heads(num_heads: int, degree: int) -> list[range]:
    """Return which heads each rank of a tensor-parallel worker holds. Pure.

    Raises:
        ValueError: the heads cannot be shared out evenly.
    """
    if degree < 1 or num_heads % degree:
        raise ValueError(f"{num_heads} heads cannot be shared out to {degree} ranks")
    step = num_heads // degree
    return [range(first, first + step) for first in range(0, num_heads, step)]


def common_heads(sender: range, receiver: range) -> range | None:
    """Return the heads that one sender rank brings to one receiver rank, None when there are none. Pure."""
    heads = range(max(sender.start, receiver.start), min(sender.stop, receiver.stop))
    return heads or None


def shard_id(transfer_id: TransferId, heads: range, num_heads: int) -> TransferId:
    """Return the id of the transfer of some heads. Pure."""
    return transfer_id if heads == range(num_heads) else TransferId(f"{transfer_id}#h{heads.start}-{heads.stop}")


@dataclass(frozen=True, slots=True)
class ShardsLanded:
    """Every shard has landed. The statistics are of all together."""

    first_token_id: int
    stats: LandedStats


@dataclass(frozen=True, slots=True)
class ShardsFailed:
    """One shard failed first; all have ended, so nothing is being written any more."""

    reason: str
    detail: str


class ShardTally:
    """Landed when all shards landed; failed when one has failed and the rest has ended. Pure but for its memory."""

    def __init__(self, shards: Iterable[TransferId]) -> None:
        self._live = set(shards)
        self._landed: list[tuple[int, LandedStats]] = []
        self._failure: ShardsFailed | None = None
        assert self._live, "a request has at least one shard"

    def landed(self, shard: TransferId, first_token_id: int, stats: LandedStats) -> None:
        """Count a shard in. Repetitions change nothing."""
        if shard not in self._live:
            return
        self._live.remove(shard)
        if self._landed and self._landed[0][0] != first_token_id and self._failure is None:
            detail = f"{shard} says that the first token is {first_token_id}, others say {self._landed[0][0]}"
            self._failure = ShardsFailed(NackReason.PROTOCOL, detail)
        if self._landed and self._landed[0][1].dropped_tokens != stats.dropped_tokens and self._failure is None:
            detail = f"{shard} left out {stats.dropped_tokens} tokens, others {self._landed[0][1].dropped_tokens}"
            self._failure = ShardsFailed(NackReason.PROTOCOL, detail)
        self._landed.append((first_token_id, stats))

    def failed(self, shard: TransferId, reason: str, detail: str) -> None:
        """Count a shard out: the first reason is the request's."""
        if shard in self._live:
            self._live.remove(shard)
            self._failure = self._failure or ShardsFailed(reason, f"{shard}: {detail}")

    @property
    def to_cancel(self) -> frozenset[TransferId]:
        """Shards that are of no use any more: the owner cancels them, and their outcomes still come."""
        return frozenset() if self._failure is None else frozenset(self._live)

    @property
    def verdict(self) -> ShardsLanded | ShardsFailed | None:
        """What became of the request; None while shards are under way."""
        if self._live:
            return None
        return self._failure or ShardsLanded(self._landed[0][0], _together([stats for _, stats in self._landed]))


def _together(shards: list[LandedStats]) -> LandedStats:
    profiles = {stats.profile for stats in shards}
    return LandedStats(
        num_frames=sum(stats.num_frames for stats in shards),
        raw_bytes=sum(stats.raw_bytes for stats in shards),
        held_tokens=min(stats.held_tokens for stats in shards),
        transfer_s=max(stats.transfer_s for stats in shards),
        exposed_s=max(stats.exposed_s for stats in shards),
        wire_bytes=sum(stats.wire_bytes for stats in shards),
        profile=profiles.pop() if len(profiles) == 1 else "mixed",
        profile_is_lossless=all(stats.profile_is_lossless for stats in shards),
        dropped_tokens=shards[0].dropped_tokens,
    )
