"""The program that compiling processes are forked from: ``python -m grammar.server`` on one end of a socket pair.

It loads xgrammar and the vocabulary once; every constraint then gets a fork of its own, which begins in milliseconds,
shares that memory, and dies alone. Never forks with threads, and touches no constraint itself.

1. It says that it is ready, or what is wrong.
2. `{"start": n, ...}` and a constraint's text, with one end of another socket pair: fork `grammar.session` on it.
3. `{"kill": n}`: that process is killed, if it is there still.
4. The other end closes: all are killed, and the program ends.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.constraint import Constraint, ConstraintKind
from core.errors import ConfigError
from grammar import wire
from grammar.compiling import Tokens
from grammar.session import Task, run

_REAP_S = 1.0  # the dead are buried at least so often
_PR_SET_PDEATHSIG = 1


class Server:
    """Forks, kills and buries."""

    def __init__(self, control: socket.socket, tokens: Tokens, max_memory_bytes: int) -> None:
        self._control = control
        self._tokens = tokens
        self._max_memory_bytes = max_memory_bytes
        self._children: dict[int, int] = {}  # process id by number

    def serve(self) -> None:
        """Return when the other end has closed."""
        gc.collect()
        gc.freeze()  # what is shared with the forks stays shared: no collection writes to it
        self._control.sendall(json.dumps({"problem": ""}).encode())
        while True:
            readable, _, _ = select.select([self._control], [], [], _REAP_S)
            self._reap()
            if not readable:
                continue
            packet, descriptors, _, _ = socket.recv_fds(self._control, wire.MAX_PACKET_BYTES, 1)
            if not packet:
                return
            order, text = wire.read_order(packet)
            if "kill" in order:
                self._kill(order["kill"])
            else:
                self._fork(order, text, socket.socket(fileno=descriptors[0]))

    def close(self) -> None:
        for number in list(self._children):
            self._kill(number)

    def _fork(self, order: Mapping[str, Any], text: str, connection: socket.socket) -> None:
        pid = os.fork()
        if pid:
            connection.close()
            self._children[order["start"]] = pid
            return
        status = 1
        try:
            self._control.close()
            _restrict(self._max_memory_bytes)
            constraint = Constraint(ConstraintKind(order["kind"]), text)
            run(connection, Task(constraint, order["token_timeout_s"], order["is_followed"]), self._tokens)
            status = 0
        except (BrokenPipeError, ConnectionResetError):
            status = 0  # nobody is interested any more
        finally:
            os._exit(status)

    def _kill(self, number: int) -> None:
        pid = self._children.pop(number, None)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)  # it was not buried yet, so the id is still its own
            os.waitpid(pid, 0)

    def _reap(self) -> None:
        for number, pid in list(self._children.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self._children[number]


def _restrict(max_memory_bytes: int) -> None:
    """Bound this process: it ends with the server, and is the first to go when memory is short."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped_bytes + max_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> int:
    """Serve on the descriptor given; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m grammar.server")
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--end-token-ids", type=json.loads, required=True)
    parser.add_argument("--max-memory-bytes", type=int, required=True)
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's: whoever started us closes the socket
    with socket.socket(fileno=given.descriptor) as control:
        try:
            tokens = Tokens.load(given.model, given.vocab_size, given.end_token_ids)
        except ConfigError as error:
            control.sendall(json.dumps({"problem": str(error)}).encode())
            return 1
        server = Server(control, tokens, given.max_memory_bytes)
        try:
            server.serve()
        finally:
            server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
