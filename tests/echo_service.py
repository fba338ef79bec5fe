"""A service that does nothing but live, for tests of what starts and supervises services."""

import asyncio
import os

from cluster.service_host import Seat
from core.errors import ConfigError, WorkerLost


class EchoService:
    """`behaviour`: serve | refuse (start fails) | hang (start never returns) | give_up (run fails at once)."""

    def __init__(self, behaviour: str, seat: Seat) -> None:
        self._behaviour = behaviour
        self._seat = seat
        self._stopped = asyncio.Event()

    async def start(self) -> str:
        if self._behaviour == "refuse":
            raise ConfigError("model.path: no such model")
        if self._behaviour == "hang":
            await self._stopped.wait()
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        return f"{self._seat.host}|{cores}|{os.environ['OMP_NUM_THREADS']}|{os.environ.get('CUDA_VISIBLE_DEVICES')}"

    async def run(self) -> None:
        if self._behaviour == "give_up":
            raise WorkerLost("fenced")
        await self._stopped.wait()

    async def stop(self, deadline_s: float) -> None:
        self._stopped.set()
