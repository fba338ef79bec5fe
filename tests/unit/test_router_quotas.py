"""Tenants' quotas: counted at the store by all gateways together, and by one alone when the store is gone."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock
from core.errors import RejectedError, RejectReason
from core.ids import GatewayId
from core.store import Taken
from core.store_memory import MemoryStore
from core.token_bucket import BucketTake, TokenBucket
from router.config import TenantConfig
from router.quotas.config import QuotasConfig
from router.quotas.limits import Quota, TenantQuotas, key
from router.quotas.local_counts import LocalCounts
from router.quotas.service import QuotaCharge, Quotas

CONFIG = QuotasConfig(deadline_s=5.0, burst_s=60.0, slot_lease_s=9.0, retry_interval_s=0.01)
TENANTS = {
    "rpm": TenantConfig(requests_per_minute=3),
    "tpm": TenantConfig(tokens_per_minute=600),
    "both": TenantConfig(requests_per_minute=2, tokens_per_minute=600),
    "slots": TenantConfig(max_concurrent_requests=4),
    "all": TenantConfig(requests_per_minute=60, tokens_per_minute=6000, max_concurrent_requests=2),
}


class WatchedStore(MemoryStore):
    """Says when a gateway tells of its slots."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.renewed = asyncio.Event()

    async def renew_slots(self, key: str, holders: Sequence[str], *, ttl_s: float) -> None:
        await super().renew_slots(key, holders, ttl_s=ttl_s)
        self.renewed.set()


class World:
    """A store with several gateways, on a clock turned by hand."""

    def __init__(self, num_gateways: int = 1) -> None:
        self.clock = ManualClock()
        self.store = WatchedStore(self.clock)
        self.num_replicas = num_gateways
        self.gateways = [self.gateway(f"gw{n}") for n in range(num_gateways)]

    def gateway(self, name: str, config: QuotasConfig = CONFIG) -> Quotas:
        return Quotas(
            self.store,
            "test",
            GatewayId(name),
            self.clock,
            config,
            tenant_config=lambda tenant: TENANTS.get(tenant, TenantConfig()),
            num_replicas=lambda: self.num_replicas,
        )


@asynccontextmanager
async def kept(*gateways: Quotas) -> AsyncIterator[None]:
    """Run the keepers."""
    tasks = [asyncio.create_task(gateway.run()) for gateway in gateways]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def refused(gateway: Quotas, tenant: str, tokens: int = 1) -> RejectedError:
    with pytest.raises(RejectedError) as refusal:
        await gateway.charge(tenant, tokens)
    return refusal.value


async def charged(gateway: Quotas, tenant: str, tokens: int = 1) -> QuotaCharge:
    charge = await gateway.charge(tenant, tokens)
    assert charge is not None
    return charge


async def test_a_tenant_without_quotas_costs_no_question() -> None:
    world = World()
    world.store.set_available(False)
    assert await world.gateways[0].charge("somebody", 10**9) is None
    assert not world.gateways[0].is_store_lost
    world.gateways[0].settle(None, 5)
    world.gateways[0].refund(None)


async def test_requests_per_minute_hold_over_all_gateways() -> None:
    world = World(3)
    for gateway in world.gateways:
        await charged(gateway, "rpm")
    for gateway in world.gateways:
        error = await refused(gateway, "rpm")
        assert error.reason is RejectReason.RATE_LIMITED
        assert error.retry_after_s == pytest.approx(20.0)
        assert "3 requests per minute" in str(error)
    world.clock.advance(20.5)
    await charged(world.gateways[2], "rpm")
    await refused(world.gateways[0], "rpm")


async def test_tokens_per_minute_are_corrected_to_those_used() -> None:
    world = World(2)
    a, b = world.gateways
    charge = await charged(a, "tpm", 500)
    error = await refused(b, "tpm", 200)
    assert error.retry_after_s == pytest.approx(10.0)
    assert "600 tokens per minute" in str(error)
    a.settle(charge, 100)
    await a.close()
    second = await charged(b, "tpm", 500)
    b.settle(second, 1100)  # it said much more than predicted: a debt
    await b.close()
    assert (await refused(a, "tpm", 60)).retry_after_s == pytest.approx(66.0)


async def test_a_prompt_beyond_a_minutes_tokens_waits_for_a_full_bucket() -> None:
    world = World()
    await charged(world.gateways[0], "tpm", 6000)
    assert (await refused(world.gateways[0], "tpm", 6000)).retry_after_s == pytest.approx(600.0)


async def test_a_refusal_by_one_quota_uses_nothing_of_another() -> None:
    world = World()
    gateway = world.gateways[0]
    await charged(gateway, "both", 600)
    for _ in range(5):
        assert "tokens per minute" in str(await refused(gateway, "both", 300))
    world.clock.advance(30.0)
    await charged(gateway, "both", 300)


async def test_a_refund_gives_all_back() -> None:
    world = World()
    gateway = world.gateways[0]
    for _ in range(10):
        gateway.refund(await charged(gateway, "all", 6000))
        await gateway.close()
    assert gateway.num_held("all") == 0
    await charged(gateway, "all", 6000)


async def test_requests_at_once_hold_over_all_gateways_and_come_back() -> None:
    world = World(2)
    a, b = world.gateways
    charges = [await charged(gateway, "slots") for gateway in (a, a, b, b)]
    error = await refused(a, "slots")
    assert (error.reason, error.retry_after_s) == (RejectReason.CONCURRENCY, CONFIG.busy_retry_after_s)
    b.settle(charges[2], 1)
    await b.close()
    await charged(a, "slots")
    await refused(b, "slots")
    assert (a.num_held("slots"), b.num_held("slots")) == (3, 1)


async def test_a_rate_refusal_gives_the_slot_back() -> None:
    world = World()
    gateway = world.gateways[0]
    first = await charged(gateway, "all", 6000)
    for _ in range(3):
        assert (await refused(gateway, "all", 6000)).reason is RejectReason.RATE_LIMITED
        await gateway.close()
    assert gateway.num_held("all") == 1
    gateway.settle(first, 0)
    await gateway.close()
    await charged(gateway, "all", 10)
    await charged(gateway, "all", 10)


async def test_the_slots_of_a_killed_gateway_come_back_with_their_leases() -> None:
    world = World(2)
    dead, alive = world.gateways
    for _ in range(3):
        await charged(dead, "slots")
    await charged(alive, "slots")
    async with kept(alive):  # the other one's keeper is dead
        for _ in range(3):
            await refused(alive, "slots")
            world.clock.advance(CONFIG.slot_lease_s / 3 + 0.1)
            await renewals(alive)
        for _ in range(3):
            await charged(alive, "slots")
        await refused(alive, "slots")


async def renewals(gateway: Quotas) -> None:
    """Let the keeper see that time has passed: it wakes for work."""
    gateway.settle(await charged(gateway, "tpm", 1), 0)
    await settled()


async def settled() -> None:
    """Let the keepers do what they have to: at this store nothing waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_client_that_leaves_while_the_store_is_asked_leaves_no_slot() -> None:
    asked = asyncio.Event()

    class SlowStore(WatchedStore):
        async def acquire_slot(self, key: str, holder: str, *, limit: int, ttl_s: float) -> bool:
            taken = await super().acquire_slot(key, holder, limit=limit, ttl_s=ttl_s)
            asked.set()
            await asyncio.Event().wait()
            return taken

    world = World()
    world.store = SlowStore(world.clock)
    gateway = world.gateway("slow")
    asking = asyncio.create_task(gateway.charge("slots", 1))
    await asked.wait()
    assert gateway.num_held("slots") == 1
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await gateway.close()
    assert gateway.num_held("slots") == 0
    assert await MemoryStore.acquire_slot(
        world.store, key("tandem:test:quota:", "slots", Quota.CONCURRENCY), "new", limit=1, ttl_s=1.0
    )


async def test_without_the_store_each_gateway_gives_its_share() -> None:
    world = World(3)
    world.store.set_available(False)
    for gateway in world.gateways:
        await charged(gateway, "rpm")
        error = await refused(gateway, "rpm")
        assert error.reason is RejectReason.RATE_LIMITED
        assert error.retry_after_s == pytest.approx(60.0)
        assert gateway.is_store_lost
    for gateway in world.gateways:
        await charged(gateway, "slots")  # a third of four, and at least one
        assert (await refused(gateway, "slots")).reason is RejectReason.CONCURRENCY


async def test_what_was_used_in_good_times_counts_in_the_outage() -> None:
    world = World(2)
    gateway = world.gateways[0]
    charge = await charged(gateway, "tpm", 290)
    world.store.set_available(False)
    assert (await refused(gateway, "tpm", 50)).retry_after_s == pytest.approx(8.0)  # share: 300 tokens, 5 per second
    gateway.settle(charge, 150)
    await charged(gateway, "tpm", 150)


async def test_serving_more_than_a_share_in_good_times_is_no_debt() -> None:
    world = World(2)
    gateway = world.gateways[0]
    await charged(gateway, "tpm", 600)
    world.store.set_available(False)
    assert (await refused(gateway, "tpm", 50)).retry_after_s == pytest.approx(10.0)


async def test_a_store_that_hangs_costs_one_deadline_once() -> None:
    class HungStore(WatchedStore):
        calls = 0

        async def take_tokens(self, takes: Sequence[BucketTake], *, is_forced: bool = False) -> Taken:
            self.calls += 1
            await asyncio.Event().wait()
            raise AssertionError("it hangs")

    world = World()
    world.store = store = HungStore(world.clock)
    gateway = world.gateway("gw", CONFIG.model_copy(update={"deadline_s": 0.02}))
    for _ in range(3):
        await charged(gateway, "rpm")
    assert (store.calls, gateway.is_store_lost) == (1, True)
    await refused(gateway, "rpm")


class SlowStore(WatchedStore):
    """Answers a ping, but later than a request may wait."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.probed = asyncio.Event()

    async def ping(self) -> None:
        try:
            await asyncio.sleep(0.2)
        finally:
            asyncio.get_running_loop().call_soon(self.probed.set)


async def test_a_store_that_is_too_slow_for_requests_is_not_found_again() -> None:
    world = World()
    world.store = store = SlowStore(world.clock)
    gateway = world.gateway("gw", CONFIG.model_copy(update={"deadline_s": 0.01}))
    store.set_available(False)
    await charged(gateway, "rpm")
    store.set_available(True)
    async with asyncio.timeout(5.0), kept(gateway):
        await store.probed.wait()
        await asyncio.sleep(0)
        assert gateway.is_store_lost, "every request would wait for it, and then count alone all the same"


async def test_a_store_that_forgot_everything_learns_of_the_slots_again() -> None:
    world = World(2)
    a, b = world.gateways
    for gateway in (a, b):
        await charged(gateway, "slots")
    world.store.set_available(False)
    alone = await charged(a, "slots")
    await refused(a, "slots")
    await world_restart(world)
    async with kept(a, b):
        async with asyncio.timeout(10.0):
            await world.store.renewed.wait()
        await settled()
        assert not a.is_store_lost
        b_third = await charged(b, "slots")
        world.clock.advance(CONFIG.slot_lease_s / 3 + 0.1)
        await renewals(b)
        assert (a.num_held("slots"), b.num_held("slots")) == (2, 2)
        await refused(a, "slots")
        a.settle(alone, 1)
        b.settle(b_third, 1)
        await settled()
        await charged(a, "slots")


async def world_restart(world: World) -> None:
    """The store comes back empty."""
    world.store.set_available(True)
    for tenant in TENANTS:
        for quota in Quota:
            await world.store.delete(key("tandem:test:quota:", tenant, quota))


def test_local_counts_are_bounded_and_forget_the_longest_unused() -> None:
    counts = LocalCounts(max_tenants=2)
    take = BucketTake("b", 10.0, 10.0, 0.001)
    assert counts.take("a", [take], 1, 0.0) is None
    assert counts.take("b", [take], 1, 0.0) is None
    refusal = counts.take("a", [take], 1, 0.0)
    assert refusal is not None
    assert refusal[0] == "b"
    assert refusal[1] == pytest.approx(10_000.0)
    assert counts.take("c", [take], 1, 0.0) is None  # b is forgotten
    assert len(counts) == 2
    assert counts.take("a", [take], 1, 0.0) is not None
    assert counts.take("b", [take], 1, 0.0) is None


@given(
    st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 30.0)), max_size=40),
    st.floats(1.0, 20.0),
    st.floats(0.1, 10.0),
)
def test_no_window_gets_more_than_burst_and_rate(
    steps: list[tuple[float, float]], capacity: float, rate: float
) -> None:
    bucket, now = TokenBucket(capacity, 0.0), 0.0
    taken: list[tuple[float, float]] = []
    for pause, amount in steps:
        now += pause
        take = BucketTake("b", min(amount, capacity), capacity, rate)
        bucket.refill(take, now)
        wait_s = bucket.wait_s(take)
        if wait_s == 0.0:
            bucket.take(take)
            taken.append((now, take.amount))
        assert 0.0 <= wait_s <= capacity / rate + 1e-9
        assert -1e-9 <= bucket.level <= capacity
    for start, _ in taken:
        for end in [at for at, _ in taken if at >= start]:
            total = sum(amount for at, amount in taken if start <= at <= end)
            assert total <= capacity + (end - start) * rate + 1e-6


def test_quotas_as_takes() -> None:
    quotas = TenantQuotas.of("t", TenantConfig(requests_per_minute=6, tokens_per_minute=600))
    assert quotas is not None
    takes = quotas.takes("p:", 10.0, requests=1, tokens=50)
    assert takes == {
        Quota.REQUESTS: BucketTake("p:{t}:rpm", 1, 1.0, 0.1),
        Quota.TOKENS: BucketTake("p:{t}:tpm", 50, 100.0, 10.0),
    }
    assert set(quotas.takes("p:", 10.0, requests=0, tokens=-5)) == {Quota.TOKENS}
    assert TenantQuotas.of("t", TenantConfig(weight=2.0)) is None
