"""Whose turn it is among tenants that wait: virtual token counters.

Each tenant has a counter of what it was served, in weighted tokens over its share; the least counter goes first.
1. A tenant that comes back after a pause is lifted to the counters of those who waited meanwhile: who asked for nothing
   has saved nothing.
2. A request is charged when it is released, by its expected length, and corrected at its end.
3. All counters lie between the floor (that of the tenant served last, when it was chosen) and the floor plus the
   largest charge. So two tenants that both wait throughout any time are served amounts that differ by at most twice
   the largest charge, corrections aside.
4. An endless row of new tenants, each lifted only to the floor, would starve one that stands above it. So newcomers are
   lifted further as time goes on: to a virtual time that runs at the speed at which each of those who wait would
   advance under ideal sharing, up to the highest place that 3. allows. Ties go to who has waited longer.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (the counters, the lift, the bound, lengths
that are predicted first and corrected later); Goyal et al., "Start-time Fair Queueing", SIGCOMM 1996 (the floor).
"""

import heapq
from collections.abc import Callable

_MAX_PAUSED = 1024  # tenants without a request here whose counter is remembered


class FairShares:
    """The counters of one band.

    Args:
        share_of: a tenant's share against others, > 0.
    """

    def __init__(self, share_of: Callable[[str], float]) -> None:
        self._share_of = share_of
        self._counters: dict[str, float] = {}  # of those who wait, and of others while it is above the floor
        self._since: dict[str, int] = {}  # those who wait: number of their last turn, or of their coming
        self._heap: list[tuple[float, int, str]] = []  # (counter, since, tenant), with outdated ones among them
        self._total_share = 0.0  # of those who wait
        self._floor = 0.0
        self._spread = 0.0  # no counter is above floor + spread
        self._virtual = 0.0
        self._next_number = 0

    def __len__(self) -> int:
        """Tenants that wait."""
        return len(self._since)

    def counter(self, tenant: str) -> float:
        """Return what the tenant counts as served, in weighted tokens over its share."""
        return max(self._floor, self._counters.get(tenant, 0.0))

    def join(self, tenant: str) -> None:
        """From now on a request of the tenant waits. Idempotent."""
        if tenant in self._since:
            return
        lifted = max(self._floor, min(self._virtual, self._floor + self._spread))
        self._counters[tenant] = max(lifted, self._counters.get(tenant, 0.0))
        self._total_share += self._share_of(tenant)
        self._turn(tenant)

    def leave(self, tenant: str) -> None:
        """No request of the tenant waits any more. Idempotent."""
        if self._since.pop(tenant, None) is None:
            return
        self._total_share -= self._share_of(tenant)
        if not self._since:  # nobody was kept waiting for another: all are even
            self._floor = self._virtual = max(self._floor, *self._counters.values())
            self._counters.clear()
            self._heap.clear()
            self._spread = self._total_share = 0.0

    def first(self) -> str:
        """Return the tenant whose turn it is. Somebody must wait."""
        while True:
            counter, since, tenant = self._heap[0]
            if self._since.get(tenant) == since and self._counters[tenant] == counter:
                return tenant
            heapq.heappop(self._heap)

    def serve(self, tenant: str, cost: float) -> None:
        """Charge the tenant, which is `first`, for a request of `cost` weighted tokens that is released now."""
        before = self._counters[tenant]
        self._floor = max(self._floor, before)
        self._virtual = max(self._virtual, self._floor) + cost / self._total_share
        self._set(tenant, before + cost / self._share_of(tenant))
        self._turn(tenant)

    def correct(self, tenant: str, cost: float) -> None:
        """A request that was charged turned out to cost so much more (or less, negative)."""
        if not self._since:
            return  # nobody waits: all are even
        self._set(tenant, max(self._floor, self.counter(tenant) + cost / self._share_of(tenant)))
        if tenant in self._since:
            self._push(tenant)

    def check(self) -> None:
        """Assert what must hold between calls."""
        slack = 1e-9 * (1.0 + self._floor + self._spread)
        for tenant in self._since:
            assert self._floor - slack <= self._counters[tenant] <= self._floor + self._spread + slack
        assert len(self._counters) <= len(self._since) + _MAX_PAUSED + 1
        assert not self._since or self.first() in self._since

    def _set(self, tenant: str, counter: float) -> None:
        self._counters[tenant] = counter
        self._spread = max(self._spread, counter - self._floor)
        if len(self._counters) > len(self._since) + _MAX_PAUSED:
            self._forget_paused()

    def _turn(self, tenant: str) -> None:
        """Among equals, the others go first from now on."""
        self._since[tenant] = self._next_number
        self._next_number += 1
        self._push(tenant)

    def _push(self, tenant: str) -> None:
        if len(self._heap) > 4 * len(self._since) + 64:
            self._heap = [(self._counters[one], since, one) for one, since in self._since.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (self._counters[tenant], self._since[tenant], tenant))

    def _forget_paused(self) -> None:
        """Who pauses far above the floor for long may be forgiven: memory is bounded first."""
        paused = sorted((count, tenant) for tenant, count in self._counters.items() if tenant not in self._since)
        for _, tenant in paused[: len(paused) - _MAX_PAUSED // 2]:
            del self._counters[tenant]
