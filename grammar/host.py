"""Starts and ends the compiling processes, and hears their verdicts. One per gateway or worker, started when needed.

A server process (`grammar.server`) forks a process per constraint; what they may cost is bounded here: how many at
once, how many wait, how long each may take. A server that dies is started again with the next constraint.
"""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from core.clock import Clock
from core.constraint import Constraint
from core.errors import InvalidRequest, RejectedError, RejectReason, WorkerLost
from grammar import wire
from grammar.bounds import FIELD, field_of
from grammar.config import GrammarConfig
from grammar.walk import Grammar

_log = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[1]
_END_S = 5.0
_Compiled = tuple[socket.socket, Callable[[], None]]
"""The connection to a constraint's process, and what kills that."""


@dataclass(frozen=True, slots=True)
class ModelTokens:
    """Whose tokens are constrained. `path` is None when there is no checkpoint folder."""

    path: Path | None
    vocab_size: int
    end_token_ids: Sequence[int]

    @property
    def have_texts(self) -> bool:
        """Whether it is known what they spell."""
        return self.path is not None and (self.path / "tokenizer.json").is_file()


class TooSlow(InvalidRequest):
    """It did not compile in time; on a machine that was less busy it might have."""


class _Server:
    """A running server process and our end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process = process
        self.control = control

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def order(self, message: dict[str, object], text: str = "", descriptors: Sequence[int] = ()) -> None:
        """Any thread.

        Raises:
            OSError: the server has ended, or takes no more.
        """
        socket.send_fds(self.control, [wire.order_packet(message, text)], descriptors)


class GrammarHost:
    """Compiles constraints elsewhere.

    Concurrency: event loop, but `Grammar.fail` on any thread.
    """

    def __init__(self, config: GrammarConfig, tokens: ModelTokens, clock: Clock) -> None:
        self._config = config
        self._tokens = tokens
        self._clock = clock
        self._server: _Server | None = None
        self._starting = asyncio.Lock()
        self._places = asyncio.Semaphore(config.max_compiling)
        self._num_waiting = 0
        self._numbers = count(1)
        self._is_closed = False

    async def check(self, constraint: Constraint) -> None:
        """Return when the constraint can be compiled and followed.

        Raises:
            InvalidRequest: it cannot, or costs too much.
            RejectedError: QUEUE_FULL. WorkerLost: no verdict could be had.
        """
        connection, _ = await self._compile(constraint, is_followed=False)
        connection.close()

    async def open(self, constraint: Constraint) -> Grammar:
        """Return the constraint, ready to be followed.

        Raises:
            As `check`.
        """
        connection, kill = await self._compile(constraint, is_followed=True)
        return Grammar(constraint, connection, self._clock, kill)

    async def close(self) -> None:
        """End every process. Whoever still compiles hears that it is over. Idempotent."""
        self._is_closed = True
        async with self._starting:
            server, self._server = self._server, None
        if server is not None:
            await _end(server)

    async def _compile(self, constraint: Constraint, *, is_followed: bool) -> _Compiled:
        if self._num_waiting >= self._config.max_compiling + self._config.max_waiting:
            raise RejectedError(RejectReason.QUEUE_FULL, f"{self._num_waiting} constraints are being compiled", 1.0)
        self._num_waiting += 1
        try:
            async with self._places:
                return await self._compile_now(constraint, is_followed=is_followed)
        finally:
            self._num_waiting -= 1

    async def _compile_now(self, constraint: Constraint, *, is_followed: bool) -> _Compiled:
        server, number = await self._running_server(), next(self._numbers)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)

        def kill() -> None:
            if server.is_alive:
                try:
                    server.order({"kill": number})
                except OSError as error:  # it is ending, and all its processes with it
                    _log.debug("the grammar server takes no orders: %s", error)

        is_good = False
        try:
            with theirs:
                server.order(
                    {
                        "start": number,
                        "kind": constraint.kind,
                        "token_timeout_s": self._config.token_timeout_s,
                        "is_followed": is_followed,
                    },
                    constraint.text,
                    [theirs.fileno()],
                )
            await self._verdict(constraint, ours, server)
            is_good = True
        except OSError as error:
            raise WorkerLost(f"the grammar server cannot be reached: {error}") from error
        finally:
            if not is_good:
                kill()
                ours.close()
        return ours, kill

    async def _verdict(self, constraint: Constraint, connection: socket.socket, server: _Server) -> None:
        field, timeout_s = field_of(constraint), self._config.compile_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                packet = await asyncio.get_running_loop().sock_recv(connection, wire.MAX_PACKET_BYTES)
        except TimeoutError:
            raise TooSlow(field, f"takes more than {timeout_s:g} s to compile") from None
        if not packet:
            if self._is_closed or not server.is_alive:
                raise WorkerLost("the grammar server has ended")
            raise InvalidRequest(field, "cannot be compiled: its compiler needed too much memory or broke")
        problem = json.loads(packet)["problem"]
        if problem:
            raise InvalidRequest(field, f"cannot be enforced: {problem}")

    async def _running_server(self) -> _Server:
        """Raises: InvalidRequest, when this model's text cannot be constrained. WorkerLost: it does not start."""
        if self._tokens.path is None or not self._tokens.have_texts:
            raise InvalidRequest(FIELD, "this model has no tokenizer.json, so its text cannot be constrained")
        async with self._starting:
            if self._is_closed:
                raise WorkerLost("the grammar server has been closed")
            if self._server is not None and not self._server.is_alive:
                _log.error("the grammar server ended with status %s", self._server.process.returncode)
                self._server.control.close()
                self._server = None
            if self._server is None:
                self._server = await self._start(self._tokens.path)
            return self._server

    async def _start(self, path: Path) -> _Server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            server = _Server(self._spawn(path, theirs.fileno()), ours)
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                packet = await asyncio.get_running_loop().sock_recv(ours, wire.MAX_PACKET_BYTES)
        except BaseException as error:
            await _end(server)
            if isinstance(error, TimeoutError):
                raise WorkerLost("the grammar server does not start") from error
            raise
        if not packet:
            await _end(server)
            raise WorkerLost(f"the grammar server ended at its start, with status {server.process.returncode}")
        problem = json.loads(packet)["problem"]
        if problem:
            await _end(server)
            raise InvalidRequest(FIELD, f"this model's text cannot be constrained: {problem}")
        return server

    def _spawn(self, path: Path, descriptor: int) -> subprocess.Popen[bytes]:
        """Not by the event loop: uvloop forks and runs Python in the child, which dies of gRPC's threads now and then.
        The standard library's vfork runs nothing of ours."""
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "grammar.server", "--descriptor", str(descriptor)),
                *("--model", str(path), "--vocab-size", str(self._tokens.vocab_size)),
                *("--end-token-ids", json.dumps(list(self._tokens.end_token_ids))),
                *("--max-memory-bytes", str(self._config.max_memory_bytes)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor],
            env=_environment(),
            start_new_session=True,
        )


def _environment() -> dict[str, str]:
    """One thread, so that forking is safe; this source tree, wherever it is; no device."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


async def _end(server: _Server) -> None:
    server.control.close()
    try:
        await asyncio.to_thread(server.process.wait, _END_S)
    except subprocess.TimeoutExpired:
        _log.error("the grammar server does not end; it is killed")
        server.process.kill()
        await asyncio.to_thread(server.process.wait)
