"""A gateway's verdicts on constraints, by a real compiling process: clear, in time, and nobody else's affair."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from core.clock import MonotonicClock
from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest, RejectedError, RejectReason
from grammar.config import GrammarConfig
from grammar.host import GrammarHost, ModelTokens
from grammar.service import GrammarService, _name_of
from protos import inference_pb2 as pb
from tests.constrained import ALL, CHOICE, REGEX, TOKENS
from tests.fakes.cluster import fake_cluster, text_request

K = ConstraintKind
PATIENCE_S = 60.0  # a deadline, not a duration: only a hang uses it up
MANY_LENGTHS = Constraint(  # seconds of work: tens of thousands of states, each with every token
    K.JSON_SCHEMA,
    json.dumps(
        {"type": "object", "properties": {f"p{one}": {"type": "string", "maxLength": 120} for one in range(99)}}
    ),
)


@contextlib.asynccontextmanager
async def service(tokens: ModelTokens = TOKENS, **settings: object) -> AsyncIterator[GrammarService]:
    settings = {"compile_timeout_s": PATIENCE_S, **settings}
    made = GrammarService(GrammarConfig.model_validate(settings), tokens, MonotonicClock())
    try:
        yield made
    finally:
        await made.close()


def server_of(host: GrammarHost) -> int:
    """Return the process that compiling processes are forked from."""
    assert host._server is not None
    return host._server.process.pid


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process, or a call just begun, brings about."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  nothing here tells of it
            await asyncio.sleep(0.01)


REFUSED = {
    "left recursion without end": (Constraint(K.GRAMMAR, 'root ::= root "a"'), "no text can match it"),
    "reference to itself": (Constraint(K.JSON_SCHEMA, '{"$ref": "#"}'), "no text can match it"),
    "reference to nothing": (Constraint(K.JSON_SCHEMA, '{"$ref": "#/$defs/a"}'), "Cannot find field"),
    "broken regex": (Constraint(K.REGEX, "(a"), "parenthesis is not closed"),
    "lookahead": (Constraint(K.REGEX, "(?=a)b"), "Lookahead is not supported"),
    "back reference": (Constraint(K.REGEX, r"(a)\1"), "Backreference is not supported"),
    "broken grammar": (Constraint(K.GRAMMAR, "root ::= (("), "EBNF parser error"),
    "grammar without root": (Constraint(K.GRAMMAR, 'start ::= "a"'), '"root" is not found'),
    "unknown rule": (Constraint(K.GRAMMAR, "root ::= other"), '"other" is not defined'),
    "empty bounds": (Constraint(K.JSON_SCHEMA, '{"type": "integer", "minimum": 3, "maximum": 2}'), ""),
    "tag of nothing": (Constraint(K.STRUCTURAL_TAG, "{}"), "Structural tag"),
    "tag with an unknown token": (
        Constraint(K.STRUCTURAL_TAG, '{"format": {"type": "token", "token": "<|nobody|>"}}'),
        "not found in vocabulary",
    ),
    "bounds": (Constraint(K.REGEX, "((a{99}){99}){99}"), "more than 4096"),
    "time": (MANY_LENGTHS, "takes more than 3 s to compile"),
}


async def test_what_cannot_be_enforced_is_refused_by_name_and_what_can_is_not_kept_waiting_for_it() -> None:
    async with service(compile_timeout_s=3.0) as made:
        await made.check(CHOICE)  # the server is there
        pid = server_of(made._host)

        async def refusal(constraint: Constraint) -> InvalidRequest:
            with pytest.raises(InvalidRequest) as error:
                await made.check(constraint)
            return error.value

        asked = {name: asyncio.create_task(refusal(constraint)) for name, (constraint, _) in REFUSED.items()}
        for constraint in ALL.values():
            await made.check(constraint)
        errors = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
        for name, error in errors.items():
            assert error.field == f"sampling.constraint.{REFUSED[name][0].kind}"
            assert REFUSED[name][1] in error.problem, name
            assert "/project" not in error.problem
            assert "\n" not in str(error)
        await until(lambda: not children_of(pid))
        assert server_of(made._host) == pid, "none of them broke the server"
        for constraint, _ in REFUSED.values():  # remembered: nothing is compiled
            await refusal(constraint)
        assert not children_of(pid)


async def test_verdicts_are_had_once_and_bounded_and_outlive_their_server() -> None:
    async with service(max_verdicts=2, max_compiling=1, max_waiting=1) as made:
        first = asyncio.create_task(made.check(REGEX))
        await asyncio.sleep(0)
        others = [asyncio.create_task(made.check(REGEX)) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()  # whoever asked first has gone; the others get their verdict
        await asyncio.gather(*others)
        assert next(made._host._numbers) == 2, "one compilation for all"
        for constraint in (CHOICE, ALL["schema"]):
            await made.check(constraint)
        assert list(made._verdicts) == [_name_of(CHOICE), _name_of(ALL["schema"])]
        pid = server_of(made._host)
        os.kill(pid, signal.SIGSTOP)
        try:
            waiting = [asyncio.create_task(made.check(Constraint(K.REGEX, f"a{one}"))) for one in range(2)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            with pytest.raises(RejectedError) as error:
                await made.check(Constraint(K.REGEX, "b"))
            assert error.value.reason is RejectReason.QUEUE_FULL
            await made.check(ALL["schema"])  # known: nobody waits for it
        finally:
            os.kill(pid, signal.SIGCONT)
        await asyncio.gather(*waiting)
        assert made._host._server is not None
        process = made._host._server.process
        process.kill()
        await asyncio.to_thread(process.wait)
        await made.check(REGEX)
        assert server_of(made._host) != process.pid


async def test_a_model_without_tokenizer_cannot_be_constrained(tmp_path: Path) -> None:
    for path in (None, tmp_path):
        async with service(ModelTokens(path, 100, ())) as made:
            with pytest.raises(InvalidRequest, match="tokenizer") as error:
                await made.check(CHOICE)
            assert error.value.field == "sampling.constraint"


def test_nothing_is_started_for_those_who_ask_for_nothing() -> None:
    made = GrammarService(GrammarConfig(), TOKENS, MonotonicClock())
    assert made._host._server is None


def constrained(text: str, constraint: pb.Constraint) -> pb.GenerateRequest:
    request = text_request(text)
    request.sampling.constraint.CopyFrom(constraint)
    return request


async def test_plain_requests_pass_one_whose_constraint_is_being_judged(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, max_preparing=1, grammar={"compile_timeout_s": PATIENCE_S}) as cluster:
        grammars = cluster.gateway._grammars
        assert grammars is not None
        await grammars.check(Constraint(K.REGEX, "[a-z]+"))  # starts the server
        letters = pb.Constraint(regex="[a-z]+")
        await cluster.generate(constrained("first", letters)).read_all()
        pid = server_of(grammars._host)
        os.kill(pid, signal.SIGSTOP)
        try:
            held = asyncio.create_task(cluster.generate(constrained("held", pb.Constraint(regex="a+"))).read_all())
            await until(lambda: len(grammars._verdicts) == 2)
            for number in range(5):
                await cluster.generate(text_request(f"plain {number}")).read_all()
            await cluster.generate(constrained("known", letters)).read_all()
            assert not held.done()
            assert cluster.gateway.dispatcher.num_active == 0, "it takes no place before it is judged"
        finally:
            os.kill(pid, signal.SIGCONT)
        await held
        broken = cluster.generate(constrained("broken", pb.Constraint(regex="(a")))
        error = await broken.fails(grpc.StatusCode.INVALID_ARGUMENT)
        assert "sampling.constraint.regex" in str(error.details())
        await cluster.wait_idle()
