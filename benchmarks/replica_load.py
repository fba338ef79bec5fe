"""The load of the comparison of gateways: who asks for what when, a client with fail-over, and what came of it.

Arrivals are a Poisson process; part of them go on with a session: its whole prompt so far and something new, so that
where the prefix is cached matters. All from the seed: two runs get the same requests at the same times.
"""

import asyncio
import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import grpc

from core.rpc import connect
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

_FIRST_ID, _LAST_ID = 300, 4000  # ordinary tokens of the tiny model
_LOOK_S = 0.02
_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    at_s: float
    session: str
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What is drawn.

    Attributes:
        going_on: part of the arrivals that continue a session.
        prompt_tokens, turn_tokens: bounds of a first prompt, and of what a later one adds.
    """

    rate: float
    duration_s: float
    seed: int
    going_on: float = 0.5
    prompt_tokens: tuple[int, int] = (150, 450)
    turn_tokens: tuple[int, int] = (40, 160)
    output_tokens: tuple[int, int] = (4, 12)
    max_prompt_tokens: int = 1200

    def arrivals(self) -> list[Arrival]:
        rng = random.Random(self.seed)
        names = itertools.count()
        open_sessions: dict[str, tuple[int, ...]] = {}
        found: list[Arrival] = []
        now = rng.expovariate(self.rate)
        while now < self.duration_s:
            if open_sessions and rng.random() < self.going_on:
                session = rng.choice(sorted(open_sessions))
                prompt = open_sessions[session] + _tokens(rng, self.turn_tokens)
            else:
                session, prompt = f"s{next(names)}", _tokens(rng, self.prompt_tokens)
            open_sessions[session] = prompt
            if len(prompt) > self.max_prompt_tokens:
                del open_sessions[session]
            found.append(Arrival(now, session, prompt, rng.randint(*self.output_tokens)))
            now += rng.expovariate(self.rate)
        return found


def _tokens(rng: random.Random, bounds: tuple[int, int]) -> tuple[int, ...]:
    return tuple(rng.randint(_FIRST_ID, _LAST_ID) for _ in range(rng.randint(*bounds)))


@dataclass(slots=True)
class Result:
    """What the client saw of one request; times from its arrival, whatever gateway answered at last."""

    at_s: float
    ttft_s: float | None = None
    tpot_s: float = 0.0
    num_tokens: int = 0
    is_finished: bool = False
    attempts: int = 0
    error: str = ""
    indices: list[int] = field(default_factory=list)
    finished: pb.Finished | None = None


class Lateness:
    """How late this process itself was woken, all the while: what a busy machine adds to every figure.

    Use as a context manager."""

    def __init__(self) -> None:
        self._late_s: list[float] = []
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.create_task(self._watch(), name="lateness")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()

    def facts(self) -> dict[str, float]:
        ordered = sorted(self._late_s) or [0.0]
        return {
            "late_p99_ms": round(1000 * ordered[int(0.99 * (len(ordered) - 1))], 1),
            "late_max_ms": round(1000 * ordered[-1], 1),
        }

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_at = loop.time() + _LOOK_S
            await asyncio.sleep(_LOOK_S)
            self._late_s.append(loop.time() - due_at)


class Client:
    """Sends to gateways in turn. A gateway that is gone before the first token costs a retry at the next one; after
    it, the request is lost to the client, as with any HTTP client that does not resume."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._channels = [connect(address) for address in addresses]
        self._stubs = [pb_grpc.InferenceStub(channel) for channel in self._channels]
        self._turn = itertools.count()

    def add(self, address: str) -> None:
        self._channels.append(connect(address))
        self._stubs.append(pb_grpc.InferenceStub(self._channels[-1]))

    async def warm_up(self) -> None:
        """Let every gateway serve a few that do not count."""
        for _ in range(3 * len(self._stubs)):
            await self._one(Arrival(0.0, "", tuple(range(_FIRST_ID, _FIRST_ID + 64)), 4), 0.0)

    async def run(self, arrivals: Sequence[Arrival]) -> list[Result]:
        """Send everything at its time."""
        started_at = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._one(arrival, started_at + arrival.at_s)) for arrival in arrivals]
        return [task.result() for task in tasks]

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def _one(self, arrival: Arrival, due_at: float) -> Result:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, due_at - loop.time()))
        result = Result(arrival.at_s)
        sampling = pb.SamplingParams(temperature=0.0, max_tokens=arrival.max_tokens, ignore_eos=True)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=arrival.prompt),
            sampling=sampling,
            terms=pb.RequestTerms(session_id=arrival.session),
        )
        last_at = due_at
        while result.attempts < 2 * len(self._stubs):
            result.attempts += 1
            stub = self._stubs[next(self._turn) % len(self._stubs)]
            try:
                async for response in stub.Generate(request, timeout=30.0):
                    if response.HasField("delta") and response.delta.tokens:
                        last_at = loop.time()
                        if result.ttft_s is None:
                            result.ttft_s = last_at - due_at
                        result.num_tokens += len(response.delta.tokens)
                        result.indices += [token.index for token in response.delta.tokens]
                    elif response.HasField("finished"):
                        result.finished = response.finished
                result.is_finished = True
                break
            except grpc.aio.AioRpcError as error:
                result.error = f"{error.code().name}: {error.details()}"
                if error.code() not in _RETRYABLE or result.num_tokens:
                    break
        if result.ttft_s is not None and result.num_tokens > 1:
            result.tpot_s = (last_at - due_at - result.ttft_s) / (result.num_tokens - 1)
        return result


@dataclass(frozen=True, slots=True)
class Targets:
    """What a good answer is."""

    ttft_s: float
    tpot_s: float

    def are_met(self, result: Result) -> bool:
        in_time = result.ttft_s is not None and result.ttft_s <= self.ttft_s and result.tpot_s <= self.tpot_s
        return result.is_finished and in_time


def summary(results: Sequence[Result], targets: Targets) -> dict[str, float | int | str]:
    """Return what one run came to. Requests that failed, for whatever reason, miss their targets."""
    ttfts = sorted(one.ttft_s for one in results if one.ttft_s is not None)
    finished = [one.finished for one in results if one.finished is not None]
    prompt_tokens = sum(one.usage.prompt_tokens for one in finished)
    errors = sorted({one.error.split(":")[0] for one in results if one.error and not one.is_finished})
    return {
        "requests": len(results),
        "attainment_percent": round(100.0 * sum(map(targets.are_met, results)) / len(results), 2),
        "failed": sum(not one.is_finished for one in results),
        "errors": ",".join(errors),
        "retried": sum(one.attempts > 1 for one in results),
        "gaps_or_repeats": sum(one.indices != list(range(len(one.indices))) for one in results),
        "ttft_mean_ms": round(1000 * statistics.fmean(ttfts), 1) if ttfts else 0.0,
        "ttft_p50_ms": round(1000 * ttfts[len(ttfts) // 2], 1) if ttfts else 0.0,
        "ttft_p99_ms": round(1000 * ttfts[int(0.99 * (len(ttfts) - 1))], 1) if ttfts else 0.0,
        "tpot_mean_ms": round(1000 * statistics.fmean(one.tpot_s for one in results), 1),
        "hit_percent": round(100.0 * sum(one.usage.cached_tokens for one in finished) / max(1, prompt_tokens), 1),
        "asked_per_request": round(statistics.fmean(one.placement.attempts for one in finished), 3) if finished else 0,
    }
