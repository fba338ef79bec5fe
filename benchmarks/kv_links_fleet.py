"""The driver's hold on the two ends of the links benchmark: starts them, shapes the link, has runs done, adds up."""

import asyncio
import contextlib
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kv_links_outcomes import RUN_LIMIT_S
from benchmarks.kv_links_workload import Scenario, requests_of
from benchmarks.netns import ShapedPair

_ROOT = Path(__file__).parent.parent
_START_LIMIT_S = 300.0  # kernels may have to be compiled
_ANSWER_LIMIT_S = RUN_LIMIT_S + 30
_LINE_LIMIT_BYTES = 1 << 26
_CLOSE_LIMIT_S = 20.0


class PeerEnded(RuntimeError):
    """A process of the benchmark ended, or did not answer in time."""


class PeerProcess:
    """One end: orders as lines to its stdin, answers as lines from its stdout. What it logs goes to our stderr."""

    def __init__(self, role: str, process: asyncio.subprocess.Process) -> None:
        self.role = role
        self.process = process

    async def order(self, **words: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        return await self.answer(_ANSWER_LIMIT_S)

    async def answer(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(limit_s):
                line = await self.process.stdout.readline()
        except TimeoutError:
            raise PeerEnded(f"the {self.role} end did not answer within {limit_s:g} s") from None
        if not line:
            raise PeerEnded(f"the {self.role} end ended with {await self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def close(self) -> None:
        """End it: by itself when it is idle, by force when it is not."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(_CLOSE_LIMIT_S):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()


@dataclass(frozen=True, slots=True)
class Order:
    """One run.

    Attributes:
        policy: "none", a profile, "controller" or "oracle".
        rates: (seconds after the start, bit/s), ascending; the first is set before the start.
        schedule: of the oracle: (seconds after the start, of requests with this floor, profile).
        config: changes to the near end's KvTransferConfig.
    """

    policy: str
    scenario: Scenario
    rates: tuple[tuple[float, float], ...]
    schedule: tuple[tuple[float, float, str], ...] = ()
    config: tuple[tuple[str, Any], ...] = ()


class Fleet:
    """Both ends, and the link between them. Without namespaces the sender's own rate cap is the link."""

    def __init__(self, near: PeerProcess, far: PeerProcess, address: str, pair: ShapedPair | None) -> None:
        self._near = near
        self._far = far
        self._address = address
        self._pair = pair
        self._num_runs = 0

    async def run(self, order: Order) -> dict[str, Any]:
        """Return what came of each request: a list of rows under "requests", and totals."""
        self._num_runs += 1
        common: dict[str, Any] = {"run": self._num_runs, "scenario": order.scenario.model_dump_json()}
        await self._shape(order.rates[0][1])
        await self._far.order(op="expect", **common)
        config = dict(order.config)
        if self._pair is None:
            config["rate_limit_bytes_per_s"] = round(order.rates[0][1] / 8)
        await self._near.order(op="prepare", **common, address=self._address, policy=order.policy, config=config)
        start_at = asyncio.get_running_loop().time() + 0.05  # the loop's clock is time.monotonic, as that of the ends
        drift = asyncio.create_task(self._drift(order.rates[1:], start_at))
        try:
            near = await self._near.order(op="run", schedule=order.schedule, start_at=start_at)
        finally:
            drift.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drift
        far = await self._far.order(op="collect")
        return _joined(order, near, far, start_at)

    async def _drift(self, rates: Sequence[tuple[float, float]], start_at: float) -> None:
        loop = asyncio.get_running_loop()
        for at, bits_per_s in rates:
            await asyncio.sleep(start_at + at - loop.time())
            await self._shape(bits_per_s)

    async def _shape(self, bits_per_s: float) -> None:
        if self._pair is not None:
            await asyncio.to_thread(self._pair.shape, bits_per_s)


@contextlib.asynccontextmanager
async def open_fleet(pair: ShapedPair | None, recorded: Path, library: str) -> AsyncIterator[Fleet]:
    """Start both ends, and end them whatever happens."""
    peers: list[PeerProcess] = []
    try:
        for role in ("far", "near"):
            end = None if pair is None else (pair.far if role == "far" else pair.near)
            host = "127.0.0.1" if end is None else end.host
            argv = [sys.executable, "-m", "benchmarks.kv_links_peers", role, host, str(recorded), library]
            process = await asyncio.create_subprocess_exec(
                *(argv if end is None else end.command(*argv)),
                cwd=_ROOT,
                env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # c10d warns of addresses without names
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_LIMIT_BYTES,
            )
            peers.append(PeerProcess(role, process))
        far, near = peers
        address = (await far.answer(_START_LIMIT_S))["address"]
        await near.answer(_START_LIMIT_S)
        yield Fleet(near, far, address, pair)
    except BaseException:
        for peer in peers:
            peer.kill()  # in the middle of a run it would not hear that stdin was closed
        raise
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))


def _joined(order: Order, near: dict[str, Any], far: dict[str, Any], start_at: float) -> dict[str, Any]:
    """Put both ends' notes of each request together. Seconds; None for what never came."""
    scenario = order.scenario
    rows = []
    for request, row in zip(requests_of(scenario)[scenario.warm_up :], near["requests"], strict=True):
        arrived_at, first_at = row["arrived_at"], row["first_token_at"]
        landed_at = far["landed"].get(str(request.index))
        row["arrival_s"] = arrived_at - start_at
        row["ttft_s"] = None if first_at is None else first_at - arrived_at
        row["handoff_s"] = row["second_s"] = row["jct_s"] = None
        if landed_at is not None and first_at is not None and not row["failure"]:
            row["handoff_s"] = max(0.0, landed_at - first_at)
            decode_from = max(landed_at, first_at)
            row["second_s"] = decode_from + scenario.seconds_per_token - arrived_at
            row["jct_s"] = decode_from + (request.output_tokens - 1) * scenario.seconds_per_token - arrived_at
        rows.append(row)
    return {
        "requests": rows,
        "near_cpu_s": near["cpu_s"],
        "far_cpu_s": far["cpu_s"],
        "relative_error": far["relative_error"],
    }


def totals(run: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a run over its requests. Pure."""
    rows = run["requests"]
    done = [row for row in rows if row["jct_s"] is not None]
    result: dict[str, Any] = {"requests": len(rows), "failures": len(rows) - len(done)}
    result["failed"] = sorted({row["failure"][:120] for row in rows if row["failure"]})[:3]
    for name in ("jct", "ttft", "second", "handoff"):
        result |= _spread(name, [row[f"{name}_s"] for row in done])
    raw, wire = (sum(row[f"{kind}_bytes"] for row in done) for kind in ("raw", "wire"))
    result["ratio"] = round(raw / wire, 3) if wire else None
    result["raw_mb"], result["wire_mb"] = round(raw / 1e6, 1), round(wire / 1e6, 1)
    goodputs = [row["goodput"] for row in rows if row["goodput"] is not None]
    result["estimated_mbit_per_s"] = round(statistics.median(goodputs) * 8e-6, 1) if goodputs else None
    profiles = [row["profile"] for row in rows]
    result["profiles"] = {name: profiles.count(name) for name in sorted(set(profiles))}
    result["exact_share"] = round(sum(row["is_exact"] for row in rows) / max(1, len(rows)), 4)
    result["near_cpu_s"], result["far_cpu_s"] = round(run["near_cpu_s"], 3), round(run["far_cpu_s"], 3)
    error = run["relative_error"]
    result["relative_error"] = None if error is None else round(error, 5)
    return result


def _spread(name: str, seconds: list[float]) -> dict[str, float | None]:
    if not seconds:
        return {f"{name}_mean_s": None, f"{name}_p50_s": None, f"{name}_p99_s": None}
    ordered = sorted(seconds)
    return {
        f"{name}_mean_s": round(statistics.fmean(ordered), 5),
        f"{name}_p50_s": round(statistics.median(ordered), 5),
        f"{name}_p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 5),
    }
