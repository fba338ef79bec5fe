"""Prompts in, text out: the tokenizer, the intake's checks, the pieces of text that clients see, workers' reports."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import cast
from unittest import mock

import pytest

from core.clock import MonotonicClock
from core.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    PromptTooLong,
    ProtocolError,
    RejectedError,
    RejectReason,
    ServingError,
    TransferError,
    WorkerLost,
)
from core.ids import RequestId
from core.membership import LoadReport
from core.request import (
    Finish,
    FinishReason,
    GenerateRequest,
    PromptToken,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from grammar.host import ModelTokens
from grammar.service import GrammarService
from protos import inference_pb2, worker_pb2
from protos.codec import failure_to_wire, load_to_wire
from router import messages as m
from router.chat.messages import ChatMessage
from router.config import RouterConfig
from router.generation.text import GenerationText
from router.intake import ChatPrompt, GenerateCall, Intake, Prompt, TextPrompt, TokenPrompt
from router.prompt_hashes import HashKey
from router.rpc.calls import read_generate
from router.tokenizer import GatewayTokenizer, read_model_facts
from router.worker_codec import read_decode_report, read_failure, read_prefill_report
from tests.fakes.checkpoint import ASSISTANT, END, MAX_MODEL_LEN, USER, VOCAB_SIZE, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> GatewayTokenizer:
    return GatewayTokenizer.load(checkpoint)


def test_text_goes_to_ids_and_back(tokenizer: GatewayTokenizer) -> None:
    ids = tokenizer.encode("naïve")
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "naïve"
    end = tokenizer.encode(END)
    assert len(end) == 1
    assert tokenizer.decode([*ids, *end]) == "naïve", "special tokens are no text"
    assert [tokenizer.token_text(one) for one in (*ids[2:4], *end)] == ["�", "�", END]


def test_chats_are_rendered_by_the_template(tokenizer: GatewayTokenizer) -> None:
    ids = tokenizer.encode_chat([ChatMessage("user", "a"), ChatMessage("assistant", "b")])
    assert "".join(tokenizer.token_text(one) for one in ids) == f"{USER}a{ASSISTANT}b{ASSISTANT}"
    with pytest.raises(InvalidRequest, match="unknown role wizard"):
        tokenizer.encode_chat([ChatMessage("wizard", "a")])


def test_facts_come_from_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    facts = read_model_facts(checkpoint)
    assert (facts.vocab_size, facts.max_model_len, facts.eos_token_ids) == (VOCAB_SIZE, MAX_MODEL_LEN, (256,))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 9, "max_position_embeddings": 8}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert read_model_facts(tmp_path).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "vocab_size"),
        ('{"vocab_size": 3, "max_position_embeddings": -1}', "max_position_embeddings"),
    ],
)
def test_broken_checkpoints_are_one_clear_error(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=problem):
        read_model_facts(tmp_path)


def test_a_folder_without_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=str(path)) as error:
            GatewayTokenizer.load(path)
        assert "\n" not in str(error.value)


@pytest.fixture
async def intake(checkpoint: Path, tokenizer: GatewayTokenizer) -> AsyncIterator[Intake]:
    config = RouterConfig(
        model_path=checkpoint,
        served_model_name="m",
        max_prompt_bytes=2000,
        default_max_tokens=50,
        inline_prompt_bytes=1000,
        max_preparing=2,
    )
    facts = read_model_facts(checkpoint)
    grammars = GrammarService(config.grammar, ModelTokens(checkpoint, facts.vocab_size, ()), MonotonicClock())
    made = Intake(
        config,
        tokenizer,
        facts,
        random.Random(0),
        grammars=grammars,
        max_model_len=lambda: 100,
        hash_keys=lambda: {HashKey("w", 4)},
    )
    yield made
    made.close()
    await grammars.close()


def call(prompt: Prompt | None, **changes: object) -> GenerateCall:
    made = GenerateCall("", "", prompt, SamplingParams(), has_max_tokens=False, has_seed=False)
    return replace(made, **changes)  # type: ignore[arg-type]


async def test_what_was_left_open_is_filled_in(intake: Intake) -> None:
    prepared = await intake.prepare(call(TextPrompt("abc")))
    assert prepared.request.sampling.max_tokens == 50
    assert prepared.request.prompt_token_ids == tuple(await intake.tokenize(TextPrompt("abc")))
    assert len(prepared.hashes.of(HashKey("w", 1))) == 3
    nearly_full = await intake.prepare(call(TokenPrompt((1,) * 70)))
    assert nearly_full.request.sampling.max_tokens == 30
    patient = await intake.prepare(call(TokenPrompt((1,)), sampling=SamplingParams(min_tokens=60)))
    assert patient.request.sampling.max_tokens == 60
    seeded = call(TokenPrompt((1,)), sampling=SamplingParams(seed=5), has_seed=True, request_id="mine")
    request = (await intake.prepare(seeded)).request
    assert (request.sampling.seed, request.request_id) == (5, "mine")
    assert prepared.request.sampling.seed != nearly_full.request.sampling.seed


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (call(TokenPrompt((1,) * 100)), "prompt"),
        (
            call(TokenPrompt((1,) * 90), sampling=SamplingParams(max_tokens=11), has_max_tokens=True),
            "sampling.max_tokens",
        ),
        (call(TokenPrompt((1,) * 90), sampling=SamplingParams(min_tokens=11)), "sampling.min_tokens"),
    ],
)
async def test_what_does_not_fit_is_out_of_range(intake: Intake, asked: GenerateCall, field: str) -> None:
    with pytest.raises(PromptTooLong) as error:
        await intake.prepare(asked)
    assert error.value.field == field


@pytest.mark.parametrize("odd", [-1, VOCAB_SIZE], ids=["below", "above"])
async def test_token_ids_are_of_the_vocabulary(intake: Intake, odd: int) -> None:
    """Not every surface has a wire without signs."""
    with pytest.raises(InvalidRequest, match=f"{odd} is outside") as error:
        await intake.tokenize(TokenPrompt((1, odd, 1)))
    assert error.value.field == "token_ids"


async def test_lone_surrogates_are_no_text(intake: Intake) -> None:
    for prompt in (TextPrompt("\ud800"), ChatPrompt((ChatMessage("user", "\udfff"),))):
        with pytest.raises(InvalidRequest, match="Unicode"):
            await intake.tokenize(prompt)


async def test_prompts_being_tokenised_are_bounded(intake: Intake) -> None:
    long_text = TextPrompt("x" * 1500)  # above inline_prompt_bytes: in a thread
    first, second = (asyncio.create_task(intake.tokenize(long_text)) for _ in range(2))
    await asyncio.sleep(0)  # both have begun
    for refused in (intake.tokenize(TextPrompt("a")), intake.prepare(call(TextPrompt("a")))):
        with pytest.raises(RejectedError, match="2 prompts") as error:
            await refused
        assert (error.value.reason, error.value.grpc_code) == (RejectReason.QUEUE_FULL, "RESOURCE_EXHAUSTED")
        assert error.value.retry_after_s > 0
    assert await first == await second
    assert await intake.tokenize(TextPrompt("a"))


def test_token_ids_are_counted_before_they_are_read() -> None:
    class Ids:
        """Of a wire message: they may be counted, not read."""

        def __len__(self) -> int:
            return 10**7

    request = mock.Mock(WhichOneof=lambda _: "token_ids", token_ids=mock.Mock(ids=Ids()))
    with pytest.raises(PromptTooLong, match="10000000 tokens"):
        read_generate(request, max_model_len=100, tenant="")


def test_the_wire_keeps_apart_what_was_given_and_what_was_not() -> None:
    request = inference_pb2.GenerateRequest(text="x", sampling=inference_pb2.SamplingParams(seed=0))
    read = read_generate(request, max_model_len=100, tenant="")
    assert (read.has_seed, read.has_max_tokens, read.prompt) == (True, False, TextPrompt("x"))
    assert read.sampling.temperature == 1.0


def generation(tokenizer: GatewayTokenizer, *stops: str) -> GenerationText:
    request = GenerateRequest(RequestId("r"), tuple(tokenizer.encode("p")), SamplingParams(stop=stops))
    return GenerationText(tokenizer.detokenizer, request)


def tokens(*ids: int) -> list[TokenOutput]:
    return [TokenOutput(index, one) for index, one in enumerate(ids)]


def test_text_waits_for_whole_characters(tokenizer: GatewayTokenizer) -> None:
    text = generation(tokenizer)
    first, second = tokenizer.encode("é")
    assert text.push(tokens(first), None) == ""
    assert text.push(tokens(second), None) == "é"
    assert text.push(tokens(first), Finish(FinishReason.LENGTH)) == "�", "cut off in the middle of a character"


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer: GatewayTokenizer) -> None:
    text = generation(tokenizer, "END")
    assert text.push(tokens(*tokenizer.encode("a EN")), None) == "a "
    assert text.push(tokens(*tokenizer.encode("x EN")), None) == "ENx "
    assert text.push(tokens(*tokenizer.encode("D")), Finish(FinishReason.STOP, "END")) == ""
    text = generation(tokenizer, "END")
    assert text.push(tokens(*tokenizer.encode("EN")), Finish(FinishReason.LENGTH)) == "EN"


def test_a_stop_token_is_no_text(tokenizer: GatewayTokenizer) -> None:
    ids = tokenizer.encode("ab")
    assert generation(tokenizer).push(tokens(*ids), Finish(FinishReason.STOP, ids[1])) == "a"
    assert generation(tokenizer).push(tokens(*ids), Finish(FinishReason.LENGTH)) == "ab"


def test_reports_become_events() -> None:
    token = inference_pb2.GeneratedToken(index=0, token_id=7)
    finish = worker_pb2.WorkFinish(reason=inference_pb2.FINISH_REASON_LENGTH)
    scores = [
        inference_pb2.PromptToken(token_id=5),
        inference_pb2.PromptToken(
            token_id=6, logprob=-0.5, top_logprobs=[inference_pb2.Logprob(token_id=8, logprob=-0.25)]
        ),
    ]
    batch = worker_pb2.OutputBatch(
        outputs=[
            worker_pb2.WorkOutput(request_id="a", tokens=[token]),
            worker_pb2.WorkOutput(request_id="b", tokens=[token], finish=finish),
            worker_pb2.WorkOutput(request_id="c", tokens=[token], prompt_logprobs=scores),
            worker_pb2.WorkOutput(request_id="d", tokens=[token], finish=finish, prompt_logprobs=scores),
        ]
    )
    scored = (PromptToken(5, None), PromptToken(6, -0.5, (TokenLogprob(8, -0.25),)))
    out, end = TokenOutput(0, 7), Finish(FinishReason.LENGTH)
    assert read_prefill_report(worker_pb2.PrefillReport(outputs=batch)) == [
        ("a", m.PrefillProduced((out,))),
        ("b", m.PrefillFinished((out,), end)),
        ("c", m.PrefillProduced((out,), scored)),
        ("d", m.PrefillFinished((out,), end, scored)),
    ]
    assert read_decode_report(worker_pb2.DecodeReport(outputs=batch)) == [
        ("a", m.DecodeProduced((out,))),
        ("b", m.DecodeFinished((out,), end)),
        ("c", m.DecodeProduced((out,), scored)),
        ("d", m.DecodeFinished((out,), end, scored)),
    ]
    load = LoadReport(num_running=3)
    assert read_decode_report(worker_pb2.DecodeReport(load=load_to_wire(load))) == load


def test_a_cancelled_transfer_is_not_the_decode_workers_loss() -> None:
    failed = failure_to_wire(RequestId("a"), TransferError("cancelled", "LastTokenComputed"))
    ((name, event),) = cast(m.WorkEvents, read_decode_report(worker_pb2.DecodeReport(failed=failed)))
    assert name == "a"
    assert isinstance(event, m.TransferCancelled)
    lost = failure_to_wire(RequestId("a"), TransferError("link_lost", ""))
    ((_, event),) = cast(m.WorkEvents, read_decode_report(worker_pb2.DecodeReport(failed=lost)))
    assert isinstance(event, m.DecodeLost)


@pytest.mark.parametrize("read", [read_prefill_report, read_decode_report])
def test_empty_and_misplaced_reports_break_the_protocol(read: object) -> None:
    kind = worker_pb2.PrefillReport if read is read_prefill_report else worker_pb2.DecodeReport
    for report in (kind(), kind(welcome=worker_pb2.Welcome())):
        with pytest.raises(ProtocolError):
            read(report)  # type: ignore[operator]
    with pytest.raises(ProtocolError, match="reject reason"):
        read(kind(rejected=worker_pb2.Rejected(reason="mood")))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("code", "kind", "is_transient"),
    [
        ("UNAVAILABLE", WorkerLost, True),
        ("RESOURCE_EXHAUSTED", WorkerLost, True),
        ("CANCELLED", WorkerLost, True),
        ("OUT_OF_RANGE", PromptTooLong, False),
        ("INVALID_ARGUMENT", InvalidRequest, False),
        ("DEADLINE_EXCEEDED", DeadlineExceeded, False),
        ("INTERNAL", ServingError, False),
        ("NO_SUCH_CODE", ServingError, False),
    ],
)
def test_failures_are_told_apart_by_whether_another_worker_may_do_better(
    code: str, kind: type[ServingError], is_transient: bool
) -> None:
    error, retry = read_failure(worker_pb2.WorkFailed(request_id="r", grpc_code=code, reason="why", detail="so"))
    assert type(error) is kind
    assert retry is is_transient
    assert "why: so" in str(error)
