"""Whose turn it is among tenants that wait: virtual token counters.

Each tenant has a counter of what it was served, in weighted tokens over its share; the least counter goes first.
1. A tenant that comes back after a pause is lifted to the counters of those who waited meanwhile: who asked for nothing
   has saved nothing.
2. A request is charged when it is released, by its expected length, and corrected at its end. When its tenant was
   lifted in between, or nobody waited at some time, what came before is settled: neither side owes anything.
3. All counters lie between the floor (that of the tenant served last, when it was chosen) and the floor plus the
   largest charge. So two tenants that both wait throughout any time are served amounts that differ by at most twice
   the largest charge, corrections aside.
4. An endless row of new tenants, each lifted only to the floor, would starve one that stands above it. So the height
   that newcomers are lifted to never stands still: it rises with everything that is served, though slower than the
   floor does under ordinary sharing (who pauses often should not pay for it), up to the highest counter there is. Ties
   go to who has waited longer.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (the counters, the lift, the bound, lengths
that are predicted first and corrected later); Goyal et al., "Start-time Fair Queueing", SIGCOMM 1996 (the floor).
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

_CREEP = 0.125  # of the speed of ideal sharing: what newcomers are lifted to rises at least so fast
_MAX_PAUSED = 1024  # tenants without a request here whose counter is remembered


@dataclass(slots=True)
class _Account:
    """`lift`: number of the last lift, or of the beginning: what was charged under another one is settled."""

    counter: float
    lift: int


class FairShares:
    """The counters of one band.

    Args:
        share_of: a tenant's share against others, > 0.
    """

    def __init__(self, share_of: Callable[[str], float]) -> None:
        self._share_of = share_of
        self._accounts: dict[str, _Account] = {}  # of those who wait, and of others that were served meanwhile
        self._since: dict[str, int] = {}  # those who wait: number of their last turn, or of their coming
        self._heap: list[tuple[float, int, str]] = []  # (counter, since, tenant), with outdated ones among them
        self._total_share = 0.0  # of those who wait
        self._floor = 0.0
        self._ceiling = 0.0
        self._entrance = 0.0  # what newcomers are lifted to
        self._next_number = 0

    def __len__(self) -> int:
        """Tenants that wait."""
        return len(self._since)

    @property
    def num_remembered(self) -> int:
        """Tenants whose counter is kept, waiting or not."""
        return len(self._accounts)

    def counter(self, tenant: str) -> float:
        """Return what the tenant counts as served, in weighted tokens over its share."""
        account = self._accounts.get(tenant)
        return self._floor if account is None else account.counter

    def join(self, tenant: str) -> None:
        """From now on a request of the tenant waits. Idempotent."""
        if tenant in self._since:
            return
        entrance = min(max(self._floor, self._entrance), self._ceiling)
        account = self._accounts.get(tenant)
        if account is None or account.counter < entrance:
            self._accounts[tenant] = _Account(entrance, self._next_number)
        self._total_share += self._share_of(tenant)
        self._turn(tenant)

    def leave(self, tenant: str) -> None:
        """No request of the tenant waits any more. Idempotent."""
        if self._since.pop(tenant, None) is None:
            return
        self._total_share -= self._share_of(tenant)
        if not self._since:  # nobody was kept waiting for another: all are even
            self._floor = self._entrance = self._ceiling
            self._accounts.clear()
            self._heap.clear()
            self._total_share = 0.0

    def first(self) -> str:
        """Return the tenant whose turn it is. Somebody must wait."""
        while True:
            counter, since, tenant = self._heap[0]
            if self._since.get(tenant) == since and self._accounts[tenant].counter == counter:
                return tenant
            heapq.heappop(self._heap)

    def serve(self, tenant: str, cost: float) -> int:
        """Charge the tenant, which is `first`, for a request of `cost` weighted tokens that is released now.

        Returns what `correct` is to be given with this charge.
        """
        account = self._accounts[tenant]
        self._floor = max(self._floor, account.counter)
        self._entrance = max(self._entrance, self._floor) + _CREEP * cost / self._total_share
        self._set(account, account.counter + cost / self._share_of(tenant))
        self._turn(tenant)
        return account.lift

    def correct(self, tenant: str, cost: float, lift: int) -> None:
        """A request that was charged turned out to cost so much more (or less, negative)."""
        account = self._accounts.get(tenant)
        if account is None or account.lift != lift:
            return
        self._set(account, account.counter + cost / self._share_of(tenant))
        if tenant in self._since:
            self._floor = min(self._floor, account.counter)
            self._push(tenant)

    def check(self) -> None:
        """Assert what must hold between calls."""
        slack = 1e-9 * (1.0 + self._ceiling)
        for tenant in self._since:
            assert self._floor - slack <= self._accounts[tenant].counter <= self._ceiling + slack
        assert set(self._since) <= set(self._accounts)
        assert not self._since or self.counter(self.first()) == min(map(self.counter, self._since))

    def _set(self, account: _Account, counter: float) -> None:
        account.counter = counter
        self._ceiling = max(self._ceiling, counter)
        if len(self._accounts) > len(self._since) + _MAX_PAUSED:
            self._forget_paused()

    def _turn(self, tenant: str) -> None:
        """Among equals, the others go first from now on."""
        self._since[tenant] = self._next_number
        self._next_number += 1
        self._push(tenant)

    def _push(self, tenant: str) -> None:
        if len(self._heap) > 4 * len(self._since) + 64:
            self._heap = [(self._accounts[one].counter, since, one) for one, since in self._since.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (self._accounts[tenant].counter, self._since[tenant], tenant))

    def _forget_paused(self) -> None:
        """Who pauses far above the floor for long may be forgiven: memory is bounded first."""
        paused = sorted((one.counter, tenant) for tenant, one in self._accounts.items() if tenant not in self._since)
        for _, tenant in paused[: len(paused) - _MAX_PAUSED // 2]:
            del self._accounts[tenant]
