"""Counts what tenants use, together with the other gateways, at the shared store; alone while that is gone.

Life of a charge:
1. `charge`, before the queue: a slot of those at once, then one request and the tokens expected (prompt and a
   predicted output) from the buckets. All or nothing, within `deadline_s`. Tenants without quotas cost nothing.
2. The slot's lease is renewed while the request lives: a killed gateway's slots come back when theirs end.
3. `settle`, at the end, whatever the end: the slot goes back, and the tokens are corrected to those really used (a debt
   is possible); or `refund`, when the gateway itself refused the request after all.

The store does not answer: this charge and the next ones are counted by `LocalCounts`, without asking, until the keeper
reaches the store again. It then tells of all slots held here, so that a store that forgot everything counts right
again at once; its buckets begin full.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from core.clock import Clock
from core.errors import RejectedError, RejectReason, StoreUnavailable
from core.ids import GatewayId
from core.store import Store
from core.token_bucket import BucketTake
from router.config import TenantConfig
from router.quotas.config import QuotasConfig
from router.quotas.limits import Quota, TenantQuotas, key
from router.quotas.local_counts import LocalCounts

_log = logging.getLogger(__name__)
_MAX_RELEASED = 4096  # slots that wait to be given back; beyond that their leases do it


@dataclass(frozen=True, slots=True)
class QuotaCharge:
    """What a request was charged. `holder` names it among all requests of all gateways; `is_shared`: at the store."""

    quotas: TenantQuotas
    holder: str
    num_tokens: int
    is_shared: bool


class Quotas:
    """One gateway's counting.

    Args:
        tenant_config: tells what holds for a tenant.
        num_replicas: tells how many gateways share the quotas, this one included.

    Concurrency: the event loop's thread. `run` is one task; without it nothing is given back to the store.
    """

    def __init__(
        self,
        store: Store,
        cluster: str,
        gateway_id: GatewayId,
        clock: Clock,
        config: QuotasConfig,
        *,
        tenant_config: Callable[[str], TenantConfig],
        num_replicas: Callable[[], int],
    ) -> None:
        self._store = store
        self._prefix = f"tandem:{cluster}:quota:"
        self._gateway_id = gateway_id
        self._clock = clock
        self._config = config
        self._tenant_config = tenant_config
        self._num_replicas = num_replicas
        self._local = LocalCounts(config.max_local_tenants)
        self._numbers = itertools.count(1)
        self._held: dict[str, set[str]] = defaultdict(set)  # tenant: holders of slots of this gateway
        self._released: deque[tuple[str, str]] = deque(maxlen=_MAX_RELEASED)  # (key, holder), for the keeper
        self._corrections: dict[str, BucketTake] = {}  # by key
        self._work = asyncio.Event()
        self._is_store_lost = False

    @property
    def is_store_lost(self) -> bool:
        """This gateway counts alone."""
        return self._is_store_lost

    def num_held(self, tenant: str) -> int:
        """Return how many slots of a tenant this gateway holds."""
        return len(self._held.get(tenant, ()))

    async def charge(self, tenant: str, num_tokens: int) -> QuotaCharge | None:
        """Count a request of about `num_tokens` tokens in all. Returns None for a tenant without quotas.

        Raises:
            RejectedError: RATE_LIMITED or CONCURRENCY, with how long to wait; nothing was counted.
        """
        quotas = TenantQuotas.of(tenant, self._tenant_config(tenant))
        if quotas is None:
            return None
        holder = f"{self._gateway_id}/{next(self._numbers)}"
        takes = self._takes(quotas, requests=1, tokens=num_tokens)
        try:
            is_shared = not self._is_store_lost and await self._charge_shared(quotas, holder, takes)
            if not is_shared:
                self._charge_alone(quotas, holder, takes)
        except BaseException:  # refused, or the client left while we asked
            self._release(tenant, holder)
            raise
        return QuotaCharge(quotas, holder, num_tokens, is_shared)

    def settle(self, charge: QuotaCharge | None, num_tokens: int) -> None:
        """The request ended, having used so many tokens of prompt and output."""
        if charge is not None:
            self._release(charge.quotas.tenant, charge.holder)
            self._correct(charge, requests=0, tokens=num_tokens - charge.num_tokens)

    def refund(self, charge: QuotaCharge | None) -> None:
        """The request was refused after all."""
        if charge is not None:
            self._release(charge.quotas.tenant, charge.holder)
            self._correct(charge, requests=-1, tokens=-charge.num_tokens)

    async def run(self) -> None:
        """Give back, correct and renew until cancelled."""
        renew_at = self._clock.now() + self._config.slot_lease_s / 3
        while True:
            if self._is_store_lost:
                await asyncio.sleep(self._config.retry_interval_s)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, renew_at - self._clock.now())):
                        await self._work.wait()
            self._work.clear()
            try:
                if self._is_store_lost:
                    await self._probe()
                if self._is_store_lost or self._clock.now() >= renew_at:
                    await self._renew()
                    renew_at = self._clock.now() + self._config.slot_lease_s / 3
                    self._find_store()
                await self._give_back()
            except StoreUnavailable as error:
                self._lose_store(str(error))

    async def close(self) -> None:
        """Give back what is left to give back, after `run` has ended. Whatever that misses ends with its lease."""
        with contextlib.suppress(StoreUnavailable):
            await self._give_back()

    async def _charge_shared(self, quotas: TenantQuotas, holder: str, takes: dict[Quota, BucketTake]) -> bool:
        """Returns False when the store did not answer: nothing is known of it then."""
        try:
            async with asyncio.timeout(self._config.deadline_s):
                await self._acquire(quotas, holder)
                if takes:
                    taken = await self._store.take_tokens(list(takes.values()))
                    if taken.refused is not None:
                        raise self._too_fast(quotas, list(takes)[taken.refused], taken.retry_after_s)
        except (StoreUnavailable, TimeoutError) as error:
            self._lose_store(str(error) or f"no answer within {self._config.deadline_s:g} s")
            return False
        self._local.charge(quotas.tenant, takes.values(), self._num_replicas(), self._clock.now())
        return True

    async def _acquire(self, quotas: TenantQuotas, holder: str) -> None:
        if quotas.max_concurrent is None:
            return
        self._held[quotas.tenant].add(holder)  # before the answer: it may be lost on the way
        slots = key(self._prefix, quotas.tenant, Quota.CONCURRENCY)
        lease_s = self._config.slot_lease_s
        if not await self._store.acquire_slot(slots, holder, limit=quotas.max_concurrent, ttl_s=lease_s):
            raise self._too_many(quotas, quotas.max_concurrent)

    def _charge_alone(self, quotas: TenantQuotas, holder: str, takes: dict[Quota, BucketTake]) -> None:
        num_replicas = self._num_replicas()
        if quotas.max_concurrent is not None:
            share = max(1, quotas.max_concurrent // num_replicas)
            holders = self._held[quotas.tenant]
            holders.add(holder)
            if len(holders) > share:
                raise self._too_many(quotas, share)
        refused = self._local.take(quotas.tenant, takes.values(), num_replicas, self._clock.now())
        if refused is not None:
            quota = next(quota for quota, take in takes.items() if take.key == refused[0])
            raise self._too_fast(quotas, quota, refused[1])

    def _too_many(self, quotas: TenantQuotas, limit: int) -> RejectedError:
        detail = f"tenant {quotas.tenant!r} has {limit} requests in the cluster, as many as it may"
        return RejectedError(RejectReason.CONCURRENCY, detail, self._config.busy_retry_after_s)

    def _too_fast(self, quotas: TenantQuotas, quota: Quota, retry_after_s: float) -> RejectedError:
        limit = quotas.requests_per_minute if quota is Quota.REQUESTS else quotas.tokens_per_minute
        detail = f"tenant {quotas.tenant!r} has used its {limit} {quota}"
        return RejectedError(RejectReason.RATE_LIMITED, detail, retry_after_s)

    def _takes(self, quotas: TenantQuotas, *, requests: float, tokens: float) -> dict[Quota, BucketTake]:
        return quotas.takes(self._prefix, self._config.burst_s, requests=requests, tokens=tokens)

    def _release(self, tenant: str, holder: str) -> None:
        holders = self._held.get(tenant, set())
        if holder not in holders:
            return
        holders.remove(holder)
        if not holders:
            del self._held[tenant]
        self._released.append((key(self._prefix, tenant, Quota.CONCURRENCY), holder))
        self._work.set()

    def _correct(self, charge: QuotaCharge, *, requests: float, tokens: float) -> None:
        takes = self._takes(charge.quotas, requests=requests, tokens=tokens)
        self._local.charge(charge.quotas.tenant, takes.values(), self._num_replicas(), self._clock.now())
        if self._is_store_lost or not charge.is_shared:
            return  # the store never knew of what was counted here, or cannot be told
        for take in takes.values():
            known = self._corrections.get(take.key)
            amount = take.amount + (known.amount if known is not None else 0.0)
            self._corrections[take.key] = BucketTake(take.key, amount, take.capacity, take.refill_per_s)
            self._work.set()

    async def _probe(self) -> None:
        """Raises: StoreUnavailable, also when the store is slower than a request may wait for it."""
        try:
            async with asyncio.timeout(self._config.deadline_s):
                await self._store.ping()
        except TimeoutError as error:
            raise StoreUnavailable(f"no answer within {self._config.deadline_s:g} s") from error

    async def _renew(self) -> None:
        for tenant, holders in list(self._held.items()):
            slots = key(self._prefix, tenant, Quota.CONCURRENCY)
            await self._store.renew_slots(slots, sorted(holders), ttl_s=self._config.slot_lease_s)

    async def _give_back(self) -> None:
        """A slot that was renewed just before it was released is released here, later: the order is right."""
        while self._released:
            await self._store.release_slot(*self._released.pop())
        corrections, self._corrections = self._corrections, {}
        for take in corrections.values():
            await self._store.take_tokens([take], is_forced=True)

    def _lose_store(self, why: str) -> None:
        if not self._is_store_lost:
            _log.warning("quotas are counted by this gateway alone, one part of %d: %s", self._num_replicas(), why)
        self._is_store_lost = True
        self._corrections.clear()
        self._work.set()

    def _find_store(self) -> None:
        if self._is_store_lost:
            _log.info("quotas are counted together again")
        self._is_store_lost = False
