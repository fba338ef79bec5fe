"""One gateway's own counts, for the time without the store: it may then give each tenant its share, one part of as many
as there are gateways (at least one request at once, however many share).

The buckets are charged in good times too, down to empty and no further: so a tenant that has just used what it may
does not begin again with a full one when the store goes, and one that this gateway served more of than its share is
not in debt. Bounded: the tenant that was unused longest is forgotten, and begins with full buckets. Pure.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from core.token_bucket import BucketTake, TokenBucket


class LocalCounts:
    """Buckets by tenant and key."""

    def __init__(self, max_tenants: int) -> None:
        self._max_tenants = max_tenants
        self._tenants: OrderedDict[str, dict[str, TokenBucket]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tenants)

    def charge(self, tenant: str, takes: Iterable[BucketTake], num_replicas: int, now: float) -> None:
        """Count what the store let a tenant take (or give back)."""
        for bucket, share in self._refilled(tenant, takes, num_replicas, now):
            bucket.take(share)
            bucket.level = max(0.0, bucket.level)

    def take(self, tenant: str, takes: Iterable[BucketTake], num_replicas: int, now: float) -> tuple[str, float] | None:
        """Take all from a tenant's share, or nothing. Returns the key that makes it wait longest, and how long."""
        pairs = self._refilled(tenant, takes, num_replicas, now)
        longest = max(pairs, key=lambda pair: pair[0].wait_s(pair[1]), default=None)
        if longest is not None and longest[0].wait_s(longest[1]) > 0:
            return longest[1].key, longest[0].wait_s(longest[1])
        for bucket, share in pairs:
            bucket.take(share)
        return None

    def _refilled(
        self, tenant: str, takes: Iterable[BucketTake], num_replicas: int, now: float
    ) -> list[tuple[TokenBucket, BucketTake]]:
        buckets = self._tenants.setdefault(tenant, {})
        self._tenants.move_to_end(tenant)
        while len(self._tenants) > self._max_tenants:
            self._tenants.popitem(last=False)
        pairs = []
        for take in takes:
            share = replace(
                take, capacity=max(1.0, take.capacity / num_replicas), refill_per_s=take.refill_per_s / num_replicas
            )
            bucket = buckets.setdefault(take.key, TokenBucket(share.capacity, now))
            bucket.refill(share, now)
            pairs.append((bucket, share))
        return pairs
