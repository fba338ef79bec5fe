"""The controller's experience in a real Redis: saved by one chooser, found by the next."""

from pathlib import Path

from prometheus_client import CollectorRegistry

from core.clock import ManualClock
from core.store_redis import RedisStore
from kv_transfer.controller.chooser import Chooser
from kv_transfer.controller.keeper import MemoryKeeper
from kv_transfer.controller.metrics import ControllerMetrics
from tests.fakes.arms import GB, outcome, policy, question
from tests.redis_process import RedisProcess

KEY = "kv_controller/cluster/prefill"


def chooser() -> Chooser:
    return Chooser(policy(), ManualClock(50.0), ControllerMetrics(CollectorRegistry()), 8)


async def test_a_restarted_worker_knows_what_its_forerunner_knew(tmp_path: Path) -> None:
    first, second, third = chooser(), chooser(), chooser()
    with RedisProcess(tmp_path) as server:
        store = RedisStore(server.url, deadline_s=5.0)
        for idx in range(10):
            asked = question(str(idx), goodput=0.02 * GB)
            first.choose(asked)
            first.observe(outcome(asked, 0.3, ratio=8.0))
        assert await MemoryKeeper(first, store, KEY, interval_s=3600.0).save()
        await store.close()
        store = RedisStore(server.url, deadline_s=5.0)
        assert await MemoryKeeper(second, store, KEY, interval_s=3600.0).load()
        assert second.snapshot() == first.snapshot() != third.snapshot()
        server.kill()
        assert not await MemoryKeeper(third, store, KEY, interval_s=3600.0).load()
        await store.close()
