"""NIXL beside ours: two processes, each with a NIXL agent over UCX, and writes of contiguous memory between them.

``python -m benchmarks.nixl_peer --tls shm,self --mib 64`` answers every line on its input with the seconds of one
write, as NIXL itself counts it done, and ends with its input. NIXL is optional; without it the first line says why.

What NIXL is given: registered warm memory, a transfer that was prepared once, agents without a progress thread whose
owners poll without pause (on two cores that was faster than the thread), and for shared memory no peer-failure
handling, which UCX's shared-memory transports do not have.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

MIB = 1024 * 1024
_WAIT_S = 60.0
UCX_TLS = {"shm": "shm,self", "auto": "shm,self", "tcp": "tcp"}


class NixlPair:
    """The two processes, as the benchmark that compares sees them."""

    def __init__(self, tls: str, mib: int) -> None:
        """Start them. `problem` is empty, or why there is nothing to compare with."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.nixl_peer", "--tls", tls, "--mib", str(mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        self.problem = str(self._answer().get("problem", ""))

    def write(self) -> float:
        """Return the seconds of one write."""
        assert self._process.stdin is not None
        self._process.stdin.write("write\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        try:
            self._process.communicate(timeout=_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_WAIT_S)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # NIXL logs on the same road
                return dict(json.loads(line))
        return {"problem": "the NIXL process ended"}


def _open_agent(name: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
    return agent


def _far(pipe: Connection, num_bytes: int) -> None:
    import torch

    agent = _open_agent("far")
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    registered = agent.register_memory([memory])
    pipe.send((agent.get_agent_metadata(), agent.get_serialized_descs(registered.trim())))
    while pipe.recv():
        while not agent.get_new_notifs().get("near"):
            pass
        pipe.send((int(memory[0]), int(memory[-1])))
    os._exit(0)  # agents that are torn down complain of each other


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def _near(num_bytes: int) -> None:
    import torch

    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    far = spawn.Process(target=_far, args=(theirs, num_bytes), daemon=True)
    far.start()
    theirs.close()
    agent = _open_agent("near")
    memory = torch.ones(num_bytes, dtype=torch.uint8)
    registered = agent.register_memory([memory])
    if not pipe.poll(_WAIT_S):
        raise TimeoutError("the far agent did not start")
    metadata, descriptors = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    transfer = agent.initialize_xfer("WRITE", registered.trim(), agent.deserialize_descs(descriptors), peer, b"done")
    _say(ready=True)
    for number, _ in enumerate(sys.stdin):
        memory[0] = memory[-1] = number % 251
        pipe.send(True)
        started = time.perf_counter()
        state: Literal["DONE", "PROC", "ERR"] = agent.transfer(transfer)
        while state == "PROC":
            state = agent.check_xfer_state(transfer)
        seconds = time.perf_counter() - started
        deadline = time.monotonic() + _WAIT_S
        while not pipe.poll(0) and time.monotonic() < deadline:
            agent.check_xfer_state(transfer)  # nobody else drives this side's progress, and the notification is ours
        written = pipe.recv()
        if state != "DONE" or written != (number % 251, number % 251):
            raise RuntimeError(f"the write ended as {state} with {written}")
        _say(seconds=seconds)
    far.kill()
    far.join(_WAIT_S)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nixl_peer", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tls", default="shm,self", help="UCX_TLS: what UCX may use (default shm,self)")
    parser.add_argument("--mib", type=int, default=64, help="size of a write (default 64)")
    args = parser.parse_args()
    os.environ.update(UCX_TLS=args.tls, UCX_LOG_LEVEL="error", NIXL_LOG_LEVEL="ERROR", OMP_NUM_THREADS="1")
    try:
        _near(args.mib * MIB)
    except Exception as error:  # whatever is missing here is said, and the comparison goes on without this side
        _say(problem=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
