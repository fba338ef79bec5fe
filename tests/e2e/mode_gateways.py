"""More gateways before the workers of one real cluster, each allowed one way to serve, in the test's own process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.clock import MonotonicClock
from core.store_redis import RedisStore
from router.config import RouterConfig
from router.service import Gateway
from tandem_client import Client
from tests.e2e.cluster_process import TINY, ClusterProcess

_NEVER_S = 1e3
_CERTAIN = {"weight": 1e12}  # nothing is learned: a busy machine is taken for an idle one
WAYS: Mapping[str, Mapping[str, Any]] = {
    "early": {"routing": {"modes": ["remote_prefill"], "late_binding": False}},
    "late": {
        "routing": {"modes": ["remote_prefill"], "late_patience_s": _NEVER_S},
        "workers": {"hold_timeout_s": _NEVER_S},
    },
    "kept": {
        "routing": {"modes": ["remote_prefill"], "late_patience_s": _NEVER_S},
        "workers": {"hold_timeout_s": 0.1},
    },
    "local": {"routing": {"modes": ["local_prefill", "colocated"], "priors": _CERTAIN | {"prefill_per_token_s": 0.1}}},
    "colocated": {"routing": {"modes": ["colocated"]}},
    "sticky": {"routing": {"affinity_credit_s": 1e3}},
}


@dataclass(frozen=True, slots=True)
class ModeGateway:
    """One of them, and a client of it. No stream is tried again after its first token."""

    gateway: Gateway
    client: Client


@contextlib.asynccontextmanager
async def mode_gateway(cluster: ClusterProcess, redis_url: str, way: str) -> AsyncIterator[ModeGateway]:
    """Yield it as soon as it reaches all four workers."""
    config = RouterConfig.model_validate({"model_path": TINY, "port": 0, **WAYS[way]})
    store = RedisStore(redis_url)
    gateway = Gateway(config, cluster.name, store, MonotonicClock())
    running: asyncio.Task[None] | None = None
    try:
        address = await gateway.start()
        running = asyncio.create_task(gateway.run())
        async with asyncio.timeout(30):
            while sum(gateway.fleet.count_live().values()) < 4:
                await gateway.fleet.changed.next().wait()
        async with Client(address) as client:
            yield ModeGateway(gateway, client)
    finally:
        await gateway.stop(1.0)
        if running is not None:
            await running
        await store.close()
