"""Real worker processes that start in a fraction of a second: forked from a server that has loaded torch once."""

import asyncio
import contextlib
import multiprocessing
import sys
from collections.abc import AsyncIterator, Sequence

from core.membership import Role
from core.worker_main import main
from decode_workers.config import DecodeWorkerConfig
from decode_workers.service import decode_worker
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.service import prefill_worker

_context = multiprocessing.get_context("forkserver")


def run(role: Role, arguments: Sequence[str]) -> None:
    """In the child: what `python -m <role>_workers` does."""
    if role is Role.PREFILL:
        sys.exit(main(role, PrefillWorkerConfig, prefill_worker, arguments))
    sys.exit(main(role, DecodeWorkerConfig, decode_worker, arguments))


@contextlib.asynccontextmanager
async def forked_worker(role: Role, *arguments: str, patience_s: float = 60.0) -> AsyncIterator[None]:
    """A worker process, not yet ready; in the end it must stop by itself on SIGTERM, with exit code 0."""
    _context.set_forkserver_preload([__name__])
    process = _context.Process(target=run, args=(role, arguments))
    await asyncio.to_thread(process.start)
    try:
        yield
        process.terminate()
        await asyncio.to_thread(process.join, patience_s)
        assert process.exitcode == 0
    finally:
        if process.exitcode is None:
            process.kill()
            await asyncio.to_thread(process.join, patience_s)
        process.close()
