"""Constraints through real workers: the tokens of one engine in every mode, and a hostile one is its own affair."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from core.constraint import Constraint, ConstraintKind
from core.ids import RequestId
from core.request import FinishReason, GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.runner import ModelRunner
from grammar.library import GrammarLibrary
from tests.constrained import ALL, CHOICE, PERSON, TINY, assert_valid, library, text_of, vocabulary
from tests.worker_pair import Pair, worker_pair
from workers.service import Worker

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one pair of workers for all
MODEL = ModelConfig(path=TINY, dtype="float32")
ENGINE = EngineConfig(num_blocks=96, block_size=8, max_batch_tokens=64, mask_timeout_s=4.0)
PROMPT = tuple(vocabulary().encode("Return a value that describes the file ", with_markers=True))


def request(name: str, constraint: Constraint | None, seed: int = 3, **changes: object) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.9, seed=seed, max_tokens=90, constraint=constraint)
    return GenerateRequest(RequestId(name), PROMPT, replace(sampling, **changes))  # type: ignore[arg-type]


ASKED = {name: request(name, constraint) for name, constraint in ALL.items()} | {"plain": request("plain", None)}


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[str, tuple[list[int], FinishReason]]]:
    """What one engine generates for each of `ASKED`, alone."""

    async def generate() -> dict[str, tuple[list[int], FinishReason]]:
        found = {}
        async with library() as grammars:
            engine = Engine(ModelRunner.load(MODEL, ENGINE), ENGINE.model_copy(update={"mask_wait_s": 5.0}))
            for name, one in ASKED.items():
                engine.add(one)
                if one.sampling.constraint is not None:
                    engine.supply(one.request_id, await grammars.get(one.sampling.constraint))
                outputs = []
                while engine.has_work():
                    outputs += engine.step()
                assert outputs[-1].finish is not None
                found[name] = [token.token_id for one in outputs for token in one.tokens], outputs[-1].finish.reason
        return found

    with asyncio.Runner() as runner:
        yield runner.run(generate())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Pair]:
    async with worker_pair(model=MODEL, engine=ENGINE, grammar={"compile_timeout_s": 60.0}) as pair:
        yield pair


def grammars_of(worker: Worker) -> GrammarLibrary:
    assert worker._parts is not None
    return worker._parts.grammars


async def start_compilers(pair: Pair) -> list[int]:
    """Have both workers start their compiling servers; return these."""
    servers = []
    for worker in (pair.prefill, pair.decode):
        await grammars_of(worker).get(CHOICE)
        server = grammars_of(worker)._host._server
        assert server is not None
        servers.append(server.process.pid)
    return servers


def result(pair: Pair, name: str) -> tuple[list[int], FinishReason]:
    ends = [
        output.finish.reason
        for output in pair.to_prefill.outputs(name) + pair.to_decode.outputs(name)
        if output.finish is not None
    ]
    assert len(ends) == 1
    return pair.token_ids(name), ends[0]


async def test_every_mode_gives_the_tokens_of_one_engine(
    pair: Pair, expected: dict[str, tuple[list[int], FinishReason]]
) -> None:
    for name, (tokens, reason) in expected.items():
        constraint = ASKED[name].sampling.constraint
        if constraint is not None and reason is FinishReason.STOP:
            assert_valid(constraint, text_of(tokens))

    def named(mode: str) -> dict[str, GenerateRequest]:
        return {name: replace(one, request_id=RequestId(f"{mode}-{name}")) for name, one in ASKED.items()}

    async def check(mode: str, name: str) -> None:
        assert result(pair, f"{mode}-{name}") == expected[name], (mode, name)

    remote = named("remote")  # the prompt there, the rest here; all at once
    await asyncio.gather(*(pair.generate(one) for one in remote.values()))
    late = named("late")  # the decode worker is named when the first token is out
    for one in late.values():
        await pair.submit_prefill(one, bind_later=True)
    for one in late.values():
        await pair.to_prefill.until_output(one.request_id)
        if pair.to_prefill.outputs(one.request_id)[-1].finish is None:
            await pair.bind(one)
            await pair.to_decode.until_finished(one.request_id)
    kept = named("kept")  # nobody is named
    for one in kept.values():
        await pair.submit_prefill(one, bind_later=True)
        await pair.to_prefill.answer("accepted", one.request_id)
        await pair.keep(one.request_id)
    alone, local = named("alone"), named("local")  # one worker does it all
    for one in alone.values():
        await pair.submit_prefill(one, hand_off=False)
    for one in local.values():
        await pair.submit_decode(one, generate=True)
    for one in (*kept.values(), *alone.values()):
        await pair.to_prefill.until_finished(one.request_id)
    for one in local.values():
        await pair.to_decode.until_finished(one.request_id)
    for mode in ("remote", "late", "kept", "alone", "local"):
        for name in ASKED:
            await check(mode, name)
    await pair.until_idle()


async def test_what_waits_for_its_grammar_is_accepted_and_passed_and_can_be_given_up(pair: Pair) -> None:
    servers = await start_compilers(pair)
    for server in servers:
        os.kill(server, signal.SIGSTOP)
    try:
        fresh = Constraint(ConstraintKind.REGEX, "[a-m]{3,9}")
        held = {name: request(name, fresh) for name in ("remote", "local", "alone", "given-up")}
        await pair.submit(held["remote"])
        await pair.submit_decode(held["local"], generate=True)
        await pair.submit_prefill(held["alone"], hand_off=False)
        await pair.submit_prefill(held["given-up"], hand_off=False)
        await pair.to_decode.answer("accepted", "local")
        for name in ("alone", "given-up"):
            await pair.to_prefill.answer("accepted", name)
        await pair.generate(request("plain-1", None))
        for stream in (pair.to_prefill, pair.to_decode):
            assert not any(stream.outputs(name) for name in held)
        await pair.abort_prefill("given-up")
    finally:
        for server in servers:
            os.kill(server, signal.SIGCONT)
    await pair.to_decode.until_finished("remote")
    await pair.to_decode.until_finished("local")
    await pair.to_prefill.until_finished("alone")
    assert result(pair, "remote") == result(pair, "local") == result(pair, "alone")
    assert not pair.to_prefill.outputs("given-up")
    await pair.until_idle()


async def test_kv_that_lands_before_the_grammar_is_there_waits_for_it(pair: Pair) -> None:
    _, server = await start_compilers(pair)
    fresh = Constraint(ConstraintKind.REGEX, "[n-z]{3,9}")
    os.kill(server, signal.SIGSTOP)
    try:
        await pair.submit(request("early", fresh))
        await pair.to_prefill.answer("handed_over", "early")  # all of it has landed
        await pair.generate(request("plain-2", None))
        assert not pair.to_decode.outputs("early")
    finally:
        os.kill(server, signal.SIGCONT)
    await pair.to_decode.until_finished("early")
    assert_valid(fresh, text_of(result(pair, "early")[0]).rstrip())
    await pair.until_idle()


@pytest.mark.parametrize("mode", ["remote", "alone"])
async def test_a_constraint_that_takes_too_long_ends_its_own_request_and_no_other(pair: Pair, mode: str) -> None:
    """Its process is stopped after some tokens, as it is by a grammar with ever more readings: nobody waits for it."""
    letters = Constraint(ConstraintKind.REGEX, f"({mode})?[a-z]+")
    slow = request(f"slow-{mode}", letters, max_tokens=600, ignore_eos=True)
    is_remote = mode == "remote"
    worker, stream = (pair.decode, pair.to_decode) if is_remote else (pair.prefill, pair.to_prefill)
    (process,) = await process_of(worker, letters)
    if is_remote:
        await pair.submit(slow)
    else:
        await pair.submit_prefill(slow, hand_off=False)
    await stream.until_output(slow.request_id)
    os.kill(process, signal.SIGSTOP)
    mates = [request(f"mate-{mode}-{seed}", PERSON if seed % 2 else None, seed) for seed in range(4)]
    for mate in mates:
        if is_remote:
            await pair.submit(mate)
        else:
            await pair.submit_prefill(mate, hand_off=False)
    for mate in mates:
        await stream.until_finished(mate.request_id)
    failed = await stream.answer("failed", slow.request_id)
    assert failed.grpc_code == "INVALID_ARGUMENT"
    assert "sampling.constraint.regex: takes more than 4 s" in failed.detail
    again = request(f"again-{mode}", letters)  # the next one gets a process of its own
    await pair.submit_prefill(again, hand_off=False)
    await pair.to_prefill.until_finished(again.request_id)
    await pair.until_idle()


async def process_of(worker: Worker, constraint: Constraint) -> set[int]:
    """Have a grammar made ready; return its process."""
    library = grammars_of(worker)
    await library.get(CHOICE)
    server = library._host._server
    assert server is not None
    before = children_of(server.process.pid)
    await library.get(constraint)
    return children_of(server.process.pid) - before


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


async def test_a_constraint_that_a_worker_refuses_fails_with_its_name(pair: Pair) -> None:
    """Gateways judge before; but a worker believes none of them."""
    for name, constraint in (
        ("unbounded", Constraint(ConstraintKind.REGEX, "((a{99}){99}){99}")),
        ("broken", Constraint(ConstraintKind.REGEX, "(a")),
    ):
        await pair.submit_prefill(request(name, constraint), hand_off=False)
        await pair.submit_decode(request(name, constraint), generate=True)
        for stream in (pair.to_prefill, pair.to_decode):
            failed = await stream.answer("failed", name)
            assert failed.grpc_code == "INVALID_ARGUMENT"
            assert "sampling.constraint.regex: " in failed.detail
    await pair.until_idle()
