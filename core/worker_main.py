"""A worker as a program of its own, for use without Ray: ``python -m prefill_workers --config f.yaml ...``.

It draws its epoch from the store, serves until SIGTERM or SIGINT, drains, and stops. A second signal stops at once.
Exit status: 0 after a signal, 1 with one line on standard error after anything else.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from core.config import ConfigModel, load_config
from core.errors import ServingError
from core.ids import Epoch, WorkerId
from core.membership import Role, WorkerIdentity, epoch_key
from core.store import Store
from core.store_redis import RedisStore
from core.telemetry import setup_logging


class Worker(Protocol):
    """What both services are."""

    async def start(self) -> str: ...

    async def run(self) -> None: ...

    async def drain(self, deadline_s: float) -> None: ...

    async def stop(self, deadline_s: float) -> None: ...


C = TypeVar("C", bound=ConfigModel)


def main(
    role: Role,
    config_model: type[C],
    make: Callable[[C, WorkerIdentity, Store], Worker],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run one worker; return the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {role}_workers", description=f"Run one {role} worker.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("--worker-id", type=WorkerId, required=True, help="unique in the cluster; kept over restarts")
    parser.add_argument("--redis-url", required=True, help="the shared store, for example redis://127.0.0.1:6379")
    parser.add_argument("--cluster", default="tandem", help="name of the cluster (default: %(default)s)")
    parser.add_argument("--drain-s", type=float, default=30.0, help="time to finish requests (default: %(default)s)")
    parser.add_argument("--log-level", default="INFO")
    given = parser.parse_args(arguments)
    try:
        setup_logging(given.worker_id, level=given.log_level)
        config = load_config(config_model, given.config)
        store = RedisStore(given.redis_url)
        return asyncio.run(
            _serve(given.cluster, given.worker_id, store, lambda who: make(config, who, store), given.drain_s)
        )
    except ServingError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


async def _serve(
    cluster: str, worker_id: WorkerId, store: Store, make: Callable[[WorkerIdentity], Worker], drain_s: float
) -> int:
    try:
        epoch = Epoch(await store.increment(epoch_key(cluster, worker_id)))
        worker = make(WorkerIdentity(worker_id, epoch, cluster))
        address = await worker.start()
        print(f"{worker_id} epoch {epoch} serves on {address}", flush=True)
        try:
            await _run_until_signal(worker, drain_s)
        finally:
            await worker.stop(0.0)
        return 0
    finally:
        await store.close()


async def _run_until_signal(worker: Worker, drain_s: float) -> None:
    """Return after a signal and the drain that follows it.

    Raises:
        ServingError: the worker ended first.
    """
    loop = asyncio.get_running_loop()
    asked, hurried = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurried if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    running = loop.create_task(worker.run())
    waiting = loop.create_task(asked.wait())
    try:
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        draining, hurry = loop.create_task(worker.drain(drain_s)), loop.create_task(hurried.wait())
        await asyncio.wait([draining, hurry], return_when=asyncio.FIRST_COMPLETED)
        await _cancel(draining, hurry)
    finally:
        await _cancel(running, waiting)


async def _cancel(*tasks: "asyncio.Task[object]") -> None:
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
