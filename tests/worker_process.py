"""One worker over the fake model in a process of its own, to be killed.

Processes are forked from a server that has imported everything once: importing torch takes seconds, forking does not.
"""

import asyncio
import multiprocessing
from contextlib import AbstractAsyncContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from core.ids import WorkerId
from core.membership import WorkerIdentity
from core.store_memory import MemoryStore
from decode_workers.config import DecodeWorkerConfig
from decode_workers.service import decode_worker
from engine.config import ModelConfig
from kv_transfer.config import KvTransferConfig
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.service import prefill_worker
from tests.worker_side import PATIENCE_S, Side
from tests.worker_stream import EPOCH
from workers.service import Worker

RoleName = Literal["prefill", "decode"]
Hold = Literal["", "computing", "copying"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.worker_process"])


def _main(role: RoleName, hold: Hold, to_test: Connection) -> None:
    asyncio.run(_serve(role, hold, to_test))


async def _serve(role: RoleName, hold: Hold, to_test: Connection) -> None:
    side = Side(num_blocks=64, max_batch_tokens=8)
    gate = side.computing if hold == "computing" else side.copying
    if hold:
        gate.close()
    model, transfer = ModelConfig(path=Path("fake")), KvTransferConfig(backend="gloo", slot_bytes=4096)
    worker: Worker
    if role == "prefill":
        identity = WorkerIdentity(WorkerId("p0"), EPOCH, "test")
        config = PrefillWorkerConfig(model=model, transfer=transfer)
        worker = prefill_worker(config, identity, MemoryStore(), load_engine=side.load)
    else:
        identity = WorkerIdentity(WorkerId("d0"), EPOCH, "test")
        decode_config = DecodeWorkerConfig(model=model, transfer=transfer)
        worker = decode_worker(decode_config, identity, MemoryStore(), load_engine=side.load)
    to_test.send(await worker.start())
    if hold:
        await gate.until_reached()
        to_test.send("held")
    await worker.run()


class WorkerProcess(AbstractAsyncContextManager["WorkerProcess"]):
    """Such a process, seen from a test. Whatever happens it is killed in the end.

    Args:
        hold: stay inside the first forward pass, or inside the copying of the first frame.
    """

    address: str

    def __init__(self, role: RoleName, hold: Hold = "") -> None:
        self._from_worker, to_test = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_main, args=(role, hold, to_test), daemon=True)
        self._process.start()
        to_test.close()

    async def __aenter__(self) -> "WorkerProcess":
        self.address = await self._next_word()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.kill()
        self._from_worker.close()

    async def until_held(self) -> None:
        assert await self._next_word() == "held"

    def kill(self) -> None:
        """As by ``kill -9``."""
        self._process.kill()
        self._process.join(PATIENCE_S)

    async def _next_word(self) -> str:
        assert await asyncio.to_thread(self._from_worker.poll, 3 * PATIENCE_S), "the worker process says nothing"
        return str(self._from_worker.recv())
