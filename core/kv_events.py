"""What a worker tells about its prefix cache, so that routers can mirror it.

Batches of one (worker, epoch) carry consecutive sequence numbers from 1. A reader that sees a gap, or a new epoch, asks
the worker for a snapshot and goes on from the snapshot's sequence number.
"""

from dataclasses import dataclass
from enum import StrEnum

from core.ids import Epoch, WorkerId


class Tier(StrEnum):
    """Where a worker keeps cached blocks."""

    DEVICE = "device"
    HOST = "host"  # must be loaded before use


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """These blocks can now be reused; `parent` is the hash before the first (the namespace root for a first block)."""

    parent: bytes
    hashes: tuple[bytes, ...]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """These blocks were evicted from this tier; another one may hold them still."""

    hashes: tuple[bytes, ...]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Everything was dropped."""


KvEvent = BlocksStored | BlocksRemoved | CacheCleared


@dataclass(frozen=True, slots=True)
class KvEventBatch:
    """Events of one engine step or so."""

    worker_id: WorkerId
    epoch: Epoch
    sequence: int
    events: tuple[KvEvent, ...]
