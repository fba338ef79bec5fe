"""The columns: real prefill and decode processes, gateways before them that are allowed one way to serve each, clients.

Two clusters, which differ in the compression of KV: none, and lossless.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from core.clock import MonotonicClock
from core.membership import Role
from core.store_redis import RedisStore
from router.config import RouterConfig
from router.prompt_hashes import PromptHashes
from router.routing.held import held_prefixes
from router.service import Gateway
from tandem_client import Client, Summary, Token
from tandem_client.types import PromptToken
from tests.e2e.held_places import full_decode_pool
from tests.forked_workers import forked_worker
from tests.model_matrix import TINY_PATH
from tests.parity.answers import Answer, Choice, Scored
from tests.parity.features import FEATURES, Feature, prompt_of, seed_of
from tests.parity.single import ENGINE
from tests.redis_process import RedisProcess

PATIENCE_S = 60.0
_NEVER_S = 1e3
_PLACES = 4  # at a decode worker
_PLAIN: Mapping[str, Any] = {"profiles": "none"}
_LOSSLESS: Mapping[str, Any] = {"policy": "lossless"}
_PATIENT: Mapping[str, Any] = {"accept_timeout_s": 60.0}  # on a busy machine: who is asked twice finds a prefix
_EARLY: Mapping[str, Any] = {
    "routing": {"modes": ["remote_prefill"], "late_binding": False},
    "workers": _PATIENT,
}
_LATE: Mapping[str, Any] = {
    "routing": {"modes": ["remote_prefill"], "late_patience_s": _NEVER_S},
    "workers": {"hold_timeout_s": _NEVER_S, **_PATIENT},
}
_ONE: Mapping[str, Any] = {"routing": {"modes": ["colocated"]}, "workers": _PATIENT}
# Prompts are taken to cost so much that nothing but what a decode worker holds of them decides.
_LOCAL: Mapping[str, Any] = {
    "routing": {"modes": ["local_prefill", "colocated"], "priors": {"weight": 1e12, "prefill_per_token_s": 0.1}},
    "workers": _PATIENT,
}


@dataclass(frozen=True, slots=True)
class Way:
    """A column.

    Attributes:
        told: what its gateway is configured with.
        cluster: of which workers.
        tenant: of whose prefixes; another way with the same one, before, left them.
        check: asserts on what a summary says that the request was served in this way.
        is_exact: it computes in the order of the single engine, so the results are equal bit for bit.
        is_crowded: its requests run together.
        is_held: no decode worker has room before the last request's first token.
    """

    name: str
    told: Mapping[str, Any]
    cluster: str
    tenant: str
    check: Callable[[Feature, Summary], None]
    is_exact: bool = False
    is_crowded: bool = False
    is_held: bool = False

    @property
    def finds_prefixes(self) -> bool:
        """Its gateway decides by what decode workers hold."""
        return self.told is _LOCAL


def _handed_over(feature: Feature, summary: Summary) -> None:
    assert not feature.decodes or summary.placement.mode == "remote_prefill", summary
    if summary.usage.completion_tokens > 1:
        assert summary.placement.kv_bytes > 0, summary
        assert summary.placement.kv_profile == "none", summary


def _cold(feature: Feature, summary: Summary) -> None:
    _handed_over(feature, summary)
    if summary.choice == 0:  # the next choice finds what this one left
        assert (summary.usage.cached_tokens, summary.placement.kv_tokens_held) == (0, 0), summary


def _lossless(feature: Feature, summary: Summary) -> None:
    assert not feature.decodes or summary.placement.mode == "remote_prefill", summary
    if summary.usage.completion_tokens > 1:
        assert (summary.placement.kv_profile, summary.placement.kv_lossless) == ("lossless", True), summary
        assert summary.placement.kv_wire_bytes > 0, summary


def _hit(feature: Feature, summary: Summary) -> None:
    is_scored = feature.scores_prompt and summary.choice == 0
    assert (summary.usage.cached_tokens > 0) is not is_scored, summary  # not scored from a cache
    if summary.usage.completion_tokens > 1:
        assert summary.placement.mode == "remote_prefill", summary
        assert summary.placement.kv_tokens_held > 0, summary


def _late(feature: Feature, summary: Summary) -> None:
    if summary.usage.completion_tokens > 1:
        assert (summary.placement.mode, summary.placement.binding) == ("remote_prefill", "late"), summary


def _alone(feature: Feature, summary: Summary) -> None:
    assert summary.placement.mode == "colocated", summary
    assert summary.placement.kv_bytes == 0, summary


def _local(feature: Feature, summary: Summary) -> None:
    is_scored = feature.scores_prompt and summary.choice == 0
    is_held = summary.usage.completion_tokens > 1  # else nothing was handed over when it was served before
    assert summary.placement.mode == ("local_prefill" if is_held and not is_scored else "colocated"), summary
    assert summary.placement.kv_bytes == 0, summary


WAYS: tuple[Way, ...] = (
    Way("disaggregated", _EARLY, "plain", "a", _cold, is_exact=True),
    Way("disaggregated, lossless profile", _EARLY, "lossless", "a", _lossless, is_exact=True),
    Way("after a prefix hit on both workers", _EARLY, "plain", "a", _hit),
    Way("in a batch with the others", _EARLY, "plain", "b", _handed_over, is_crowded=True),
    Way("bound late", _LATE, "plain", "c", _late, is_crowded=True, is_held=True),
    Way("one worker (colocated)", _ONE, "plain", "d", _alone, is_exact=True),
    Way("decode worker that holds the prefix (local)", _LOCAL, "plain", "a", _local),
)


@dataclass(slots=True)
class Cell:
    """What a way made of a feature: the answer, or what went wrong."""

    answer: Answer | None = None
    error: BaseException | None = None
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)


Asked = Sequence[tuple[Feature, Mapping[str, Any]]]


async def serve(asked: Asked, folder: Path) -> Mapping[str, Mapping[str, Cell]]:
    """Ask every way for every (feature, options); return the cells by way and feature. The ways go one by one."""
    cells: dict[str, dict[str, Cell]] = {}
    with RedisProcess(folder) as redis:
        async with _workers(redis.url, folder), contextlib.AsyncExitStack() as stack:
            gateways: dict[tuple[int, str], tuple[Gateway, str]] = {}
            for way in WAYS:
                key = id(way.told), way.cluster
                if key not in gateways:
                    gateways[key] = await stack.enter_async_context(_gateway(way, redis.url))
                gateway, address = gateways[key]
                if way.finds_prefixes:
                    await _until_known(gateway, way.tenant)
                async with Client(address, tenant=way.tenant) as client:
                    cells[way.name] = await _ask_all(way, gateway, client, asked)
    return cells


async def _until_known(gateway: Gateway, tenant: str) -> None:
    """Wait until the gateway knows of a prompt that decode workers hold; then it knows of all that they held before."""
    fleet = gateway.fleet
    (slot,) = (fleet.table.find(record.worker_id) for record in fleet.records.values() if record.role is Role.DECODE)
    prompt = prompt_of(FEATURES[0])
    assert not isinstance(prompt, str)
    async with asyncio.timeout(PATIENCE_S):
        hashes = PromptHashes(prompt, salt=tenant)
        while not held_prefixes(fleet.index, fleet.table, hashes).device[slot]:  # noqa: ASYNC110 - an index tells nobody
            await asyncio.sleep(0.01)


async def _ask_all(way: Way, gateway: Gateway, client: Client, asked: Asked) -> dict[str, Cell]:
    cells = {feature.name: Cell() for feature, _ in asked}
    if not way.is_crowded:
        for feature, options in asked:
            await _fill(cells[feature.name], way, client, feature, options)
        return cells
    async with contextlib.AsyncExitStack() as stack:
        if way.is_held:
            places = await stack.enter_async_context(full_decode_pool(gateway.fleet, _PLACES))
        async with asyncio.TaskGroup() as group:
            for feature, options in asked:
                group.create_task(_fill(cells[feature.name], way, client, feature, options))
            if way.is_held:
                async with asyncio.timeout(PATIENCE_S):
                    await asyncio.gather(*(cell.has_begun.wait() for cell in cells.values()))
                for _ in range(_PLACES):
                    await places.free_one()
    return cells


async def _fill(cell: Cell, way: Way, client: Client, feature: Feature, options: Mapping[str, Any]) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            cell.answer, summaries = await _ask(cell, client, feature, options)
        for summary in summaries:
            way.check(feature, summary)
    except Exception as error:  # one cell's; the test of the cell raises it
        cell.error = error
    finally:
        cell.has_begun.set()


async def _ask(
    cell: Cell, client: Client, feature: Feature, options: Mapping[str, Any]
) -> tuple[Answer, Sequence[Summary]]:
    wanted: Any = {**options, "seed": seed_of(feature)}
    has_token = [False] * feature.n
    pieces: Any
    if feature.chat is not None:
        chat = feature.chat
        pieces = client.chat(
            chat.messages, tools=chat.tools, tool_choice=chat.choice, parallel_tool_calls=chat.is_parallel, **wanted
        )
    else:
        pieces = client.generate(prompt_of(feature), n=feature.n, **wanted)
    collected: Any = _Collected(feature.n)
    async for piece in pieces:
        collected.add(piece)
        has_token[piece.choice] |= bool(piece.tokens) or piece.summary is not None
        if all(has_token):
            cell.has_begun.set()
    return collected.answer(), collected.summaries


class _Collected:
    """The pieces of all choices."""

    def __init__(self, n: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._tokens: list[list[Token]] = [[] for _ in range(n)]
        self._calls: list[dict[int, list[str]]] = [{} for _ in range(n)]
        self._summaries: list[Summary | None] = [None] * n
        self._scores: tuple[PromptToken, ...] = ()

    def add(self, piece: Any) -> None:
        self._scores = piece.started.prompt_scores
        self._texts[piece.choice].append(piece.text if hasattr(piece, "text") else piece.content)
        for call in getattr(piece, "tool_calls", ()):
            parts = self._calls[piece.choice].setdefault(call.index, [call.name, ""])
            parts[1] += call.arguments
        self._tokens[piece.choice] += piece.tokens
        if piece.summary is not None:
            self._summaries[piece.choice] = piece.summary

    @property
    def summaries(self) -> list[Summary]:
        return [summary for summary in self._summaries if summary is not None]

    def answer(self) -> Answer:
        choices = []
        for texts, tokens, calls, summary in zip(self._texts, self._tokens, self._calls, self.summaries, strict=True):
            assert [token.index for token in tokens] == list(range(len(tokens)))
            choices.append(
                Choice(
                    "".join(texts),
                    tuple(map(_scored, tokens)),
                    str(summary.finish_reason),
                    summary.matched_stop,
                    summary.usage.completion_tokens,
                    tuple((name, json.dumps(json.loads(arguments))) for name, arguments in calls.values()),
                )
            )
        return Answer(
            tuple(choices), self.summaries[0].usage.prompt_tokens, tuple(_scored(token) for token in self._scores)
        )


def _scored(token: Token | PromptToken) -> Scored:
    return Scored(token.token_id, token.logprob, tuple((one.token_id, one.logprob) for one in token.alternatives))


@contextlib.asynccontextmanager
async def _workers(redis_url: str, folder: Path) -> AsyncIterator[None]:
    """A prefill and a decode process of each cluster."""
    async with contextlib.AsyncExitStack() as stack:
        for cluster, transfer in (("plain", _PLAIN), ("lossless", _LOSSLESS)):
            for role in Role:
                config = folder / f"{cluster}-{role}.yaml"
                told: dict[str, Any] = {
                    "model": {"path": str(TINY_PATH), "dtype": "float32"},
                    "engine": {**ENGINE, "num_blocks": 1500},
                    "transfer": dict(transfer),
                }
                if role is Role.DECODE:
                    told["max_requests"] = _PLACES
                else:
                    told["bind_timeout_s"] = _NEVER_S
                config.write_text(yaml.safe_dump(told))
                arguments = (
                    "--config", str(config), "--worker-id", f"{cluster}-{role}", "--cluster", cluster,
                    "--redis-url", redis_url, "--drain-s", "1", "--log-level", "ERROR",
                )  # fmt: skip
                await stack.enter_async_context(forked_worker(role, *arguments))
        yield


@contextlib.asynccontextmanager
async def _gateway(way: Way, redis_url: str) -> AsyncIterator[tuple[Gateway, str]]:
    """Yield it with its address as soon as it reaches both workers."""
    told = {"model_path": TINY_PATH, "port": 0, "http": {"enabled": False}, **way.told}
    store = RedisStore(redis_url)
    gateway = Gateway(RouterConfig.model_validate(told), way.cluster, store, MonotonicClock())
    running: asyncio.Task[None] | None = None
    try:
        address = await gateway.start()
        running = asyncio.create_task(gateway.run())
        async with asyncio.timeout(PATIENCE_S):
            while sum(gateway.fleet.count_live().values()) < len(Role):
                await gateway.fleet.changed.next().wait()
        yield gateway, address
    finally:
        await gateway.stop(1.0)
        if running is not None:
            await running
        await store.close()
