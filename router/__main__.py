"""`python -m router --config gateway.yaml`: one gateway process."""

import argparse
import asyncio
import gc
import logging
import signal
import sys
from pathlib import Path

import uvloop
from pydantic import Field

from core.clock import MonotonicClock
from core.config import ConfigModel, load_config
from core.errors import ServingError
from core.store_redis import RedisStore
from core.telemetry import setup_logging
from core.tls import ClientTls
from router.config import RouterConfig
from router.service import Gateway

_log = logging.getLogger(__name__)


class GatewayProcessConfig(ConfigModel):
    """A gateway and where its cluster's shared state is."""

    cluster: str = "default"
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="redis://, rediss:// or unix://")
    redis_tls: ClientTls | None = Field(None, description="of a rediss:// URL; absent: what the system trusts")
    drain_timeout_s: float = Field(30.0, ge=0, description="how long running requests may go on after SIGTERM")
    log_level: str = "INFO"
    router: RouterConfig


async def serve(config: GatewayProcessConfig) -> None:
    """Run until SIGTERM or SIGINT, then drain."""
    store = RedisStore(config.redis_url, tls=config.redis_tls)
    gateway = Gateway(config.router, config.cluster, store, MonotonicClock())
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        address = await gateway.start()
        gc.freeze()  # what is there now stays: no collection need look at it again
        print(f"listening on {address}", flush=True)
        running = asyncio.create_task(gateway.run(), name="gateway")
        asked = asyncio.create_task(stopping.wait(), name="stop asked")
        await asyncio.wait([running, asked], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        await gateway.stop(config.drain_timeout_s)
        await running
    finally:
        await store.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of GatewayProcessConfig")
    arguments = parser.parse_args()
    try:
        config = load_config(GatewayProcessConfig, arguments.config)
        setup_logging("gateway", level=config.log_level)
        uvloop.run(serve(config))
    except ServingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
