"""`tandem up`: a cluster until a signal.

The first SIGINT, SIGTERM or SIGHUP drains and stops (while coming up: gives up at once); the second one kills.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from cluster.config import ClusterConfig
from cluster.launcher import Launcher, launcher_of
from cluster.own_session import SIGNALS
from cluster.progress import Progress
from cluster.run_file import RunRecord, claim
from cluster.workspace import end_marked
from core.errors import ServingError


class Interrupted(ServingError):
    """A signal came while the cluster was coming up; everything was taken down."""


async def serve(
    config: ClusterConfig, progress: Progress, *, source: str, on_ready: Callable[[Launcher], None]
) -> None:
    """Bring the cluster up, call `on_ready`, and serve until a signal. Must run on the main thread.

    Args:
        source: the configuration file, for people.

    Raises:
        ServingError: it did not come up; nothing is left running.
    """
    with claim(config.name) as run_file:
        async with launcher_of(config, progress) as launcher:
            record = RunRecord.of_this_process(
                config.name, launcher.gateway_address, launcher.http_urls, launcher.mark, source, launcher.credentials
            )
            run_file.write(record)
            stop = asyncio.Event()
            with _signals_set(stop, launcher.mark):
                asked = asyncio.create_task(stop.wait())
                try:
                    if not await _first(asyncio.create_task(launcher.up()), asked):
                        raise Interrupted("interrupted while starting; nothing is left running")
                    run_file.write(record.model_copy(update={"is_ready": True}))
                    on_ready(launcher)
                    progress.phase(f"serving at {launcher.gateway_address}; Ctrl-C drains and stops")
                    await _first(asyncio.create_task(launcher.run()), asked)
                finally:
                    asked.cancel()
                progress.phase("draining and stopping")
                await launcher.down()


async def _first(work: asyncio.Task[None], asked: asyncio.Task[bool]) -> bool:
    """Wait for either. Returns whether the work ended (or raises what ended it); otherwise it is cancelled."""
    await asyncio.wait([work, asked], return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        work.result()
        return True
    work.cancel()
    await asyncio.wait([work])
    return False


@contextlib.contextmanager
def _signals_set(stop: asyncio.Event, mark: str) -> Iterator[None]:
    """The first signal sets `stop`, the second kills every process of the launch, so that the way down is short."""

    def on_signal() -> None:
        if stop.is_set():
            asyncio.get_running_loop().run_in_executor(None, end_marked, mark, 5.0)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
