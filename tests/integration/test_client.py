"""The Python client and the examples against a gateway with fake workers."""

import asyncio
import hashlib
import re
from contextlib import aclosing
from pathlib import Path

import pytest
from typer.testing import CliRunner

import examples.abort
import examples.chat
import examples.choices
import examples.logprobs
import examples.prompt_scores
import examples.resumable
import examples.seeded_sampling
import examples.stream_text
from cluster.cli.app import app
from core.request import Finish
from core.request import FinishReason as Ended
from protos import worker_pb2
from tandem_client import (
    Client,
    DeadlineExceeded,
    DuplicateRequest,
    FinishReason,
    InvalidRequest,
    Message,
    ModelNotFound,
    NoWorkers,
    PromptTooLong,
    RejectedError,
    ServingError,
    Unauthenticated,
    WorkerLost,
)
from tests.fakes.checkpoint import ASSISTANT, MAX_MODEL_LEN, USER, VOCAB_SIZE
from tests.fakes.cluster import fake_cluster
from tests.fakes.script import PATIENCE_S, Reply, echo_alphabet


async def test_generates_whole_and_in_pieces(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address) as client:
        whole = await client.generate_text("hello", max_tokens=6, temperature=0.0, request_id="mine")
        assert whole.text == "abcdef"
        assert [token.index for token in whole.tokens] == list(range(6))
        assert (whole.summary.request_id, whole.summary.finish_reason) == ("mine", FinishReason.LENGTH)
        assert whole.summary.usage.prompt_tokens == 5
        assert whole.summary.placement.decode_worker == "d0"
        pieces = [piece async for piece in client.generate("hello", max_tokens=6, temperature=0.0)]
        assert "".join(piece.text for piece in pieces) == "abcdef"
        assert [piece.summary is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert len({(piece.request_id, piece.seed) for piece in pieces}) == 1


async def test_chat_token_ids_stop_and_alternatives_reach_the_worker(checkpoint: Path) -> None:
    def reply(request: worker_pb2.WorkRequest) -> Reply:
        ids = echo_alphabet(request).token_ids[:3]
        return Reply(ids, Finish(Ended.STOP, "c"))

    async with fake_cluster(checkpoint, reply=reply) as cluster, Client(cluster.address) as client:
        chat = await client.generate_text(
            [Message("user", "hi")], max_tokens=9, temperature=0.0, stop=["c"], logprobs=2
        )
        assert chat.text == "ab"
        assert chat.summary.matched_stop == "c"
        assert [len(token.alternatives) for token in chat.tokens] == [2, 2, 2]
        ids = await client.tokenize([Message("user", "hi")])
        assert ids == list(cluster.prefills[0].submits[0].request.prompt_token_ids)
        assert len(ids) == len((USER, "h", "i", ASSISTANT))
        await client.generate_text([1, 2, 3], max_tokens=9, temperature=0.0)
        assert list(cluster.prefills[0].submits[1].request.prompt_token_ids) == [1, 2, 3]


async def test_several_answers_come_in_order_with_their_own_ends(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address) as client:
        generations = await client.generate_texts("x", n=3, max_tokens=4, seed=1)
        assert [one.text for one in generations] == ["bcde", "cdef", "defg"]
        assert [one.summary.choice for one in generations] == [0, 1, 2]
        assert {one.summary.seed for one in generations} == {1}
        assert generations[0].summary.provenance.weights_version == "fake-weights"
        with pytest.raises(InvalidRequest) as refused:
            await client.generate_texts("x", n=1000)
        assert refused.value.field == "n"


async def test_messages_come_whole_and_in_pieces(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address) as client:
        conversation = [Message("user", "hi")]
        reply = await client.chat_message(conversation, max_tokens=4, temperature=0.0, logprobs=1)
        assert reply.message == Message("assistant", "abcd")
        assert [(token.text, len(token.alternatives)) for token in reply.tokens] == [(one, 1) for one in "abcd"]
        assert reply.summary.finish_reason is FinishReason.LENGTH
        pieces = [piece async for piece in client.chat([*conversation, reply.message], max_tokens=3, n=2, seed=0)]
        replies = await client.chat_messages([*conversation, reply.message], max_tokens=3, n=2, seed=0)
        assert [one.message.content for one in replies] == ["abc", "bcd"]
        for choice, text in enumerate(("abc", "bcd")):
            own = [piece for piece in pieces if piece.choice == choice]
            assert "".join(piece.content for piece in own) == text
            assert [piece.summary is not None for piece in own] == [False] * (len(own) - 1) + [True]
        prompt = list(cluster.prefills[0].submits[1].request.prompt_token_ids)
        assert prompt == await client.tokenize([*conversation, reply.message])


async def test_text_goes_to_ids_and_back(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address) as client:
        assert await client.detokenize(await client.tokenize("naïve 漢字")) == "naïve 漢字"
        with pytest.raises(InvalidRequest) as outside:
            await client.detokenize([VOCAB_SIZE])
        assert outside.value.field == "ids"
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await client.detokenize([-1])


async def test_a_scored_prompt_is_handed_out(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address) as client:
        generation = await client.generate_text("hey", max_tokens=2, prompt_logprobs=1)
        assert [(one.text, one.logprob) for one in generation.prompt_scores] == [("h", None), ("e", -0.25), ("y", -0.5)]
        assert [len(one.alternatives) for one in generation.prompt_scores] == [0, 1, 1]
        reply = await client.chat_message([Message("user", "hi")], max_tokens=2, prompt_logprobs=0)
        assert len(reply.prompt_scores) == reply.summary.usage.prompt_tokens


async def test_all_that_is_wrong_reaches_the_caller(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address) as client:
        with pytest.raises(InvalidRequest) as refused:
            await client.generate_text("x", top_p=7.0, min_p=7.0)
        assert [field for field, _ in refused.value.violations] == ["sampling.top_p", "sampling.min_p"]


async def test_a_key_opens_the_door(checkpoint: Path) -> None:
    digest = hashlib.sha256(b"tnd-secret").hexdigest()
    access = {"enabled": True, "keys": [{"name": "lab", "sha256": digest, "tenant": "lab"}]}
    async with fake_cluster(checkpoint, access=access) as cluster:
        async with Client(cluster.address, api_key="tnd-secret") as client:
            assert (await client.generate_text("x", max_tokens=2, temperature=0.0)).text == "ab"
        assert cluster.prefills[0].submits[0].request.tenant == "lab"
        for key in ("", "tnd-wrong"):
            async with Client(cluster.address, api_key=key) as client:
                with pytest.raises(Unauthenticated):
                    await client.generate_text("x")


async def test_tells_about_model_and_cluster(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=2) as cluster, Client(cluster.address) as client:
        info = await client.model_info()
        assert (info.model, info.vocab_size, info.max_model_len) == ("fake", VOCAB_SIZE, MAX_MODEL_LEN)
        assert (info.weights_version, info.dtype, info.block_size) == ("fake-weights", "float32", 4)
        assert info.has_chat_template
        assert info.eos_token_ids == (256,)
        status = await client.status()
        assert [(one.worker_id, one.state, one.connected) for one in status.workers] == [
            ("d0", "ready", True),
            ("d1", "ready", True),
            ("p0", "ready", True),
        ]
        assert (status.cluster, status.active_requests) == ("test", 0)


async def test_the_quality_of_the_transfer_is_asked_for_and_told(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address, tenant="lab") as client:
        for wanted in ("balanced", 0.5, None):
            got = await client.generate_text("hello", max_tokens=3, kv_quality=wanted, handoff_budget_s=1.5)
            placement = got.summary.placement
            assert (placement.kv_profile, placement.kv_lossless) == ("none", True)
            assert placement.kv_wire_bytes == placement.kv_bytes + 64
        submits = [submit for submit in cluster.prefills[0].submits if isinstance(submit, worker_pb2.PrefillSubmit)]
        assert [submit.kv_quality_floor for submit in submits] == [0.97, 0.5, 1.0]
        assert {(submit.handoff_budget_s, submit.request.tenant) for submit in submits} == {(1.5, "lab")}
        with pytest.raises(InvalidRequest, match="perfect") as invalid:
            await client.generate_text("x", kv_quality="perfect")
        assert invalid.value.field == "kv_quality"


async def test_decisions_come_from_one_worker_or_from_all(checkpoint: Path) -> None:
    decided = worker_pb2.KvDecision(
        transfer_id="r/0",
        peer="d0",
        profile="x8",
        reason="fastest",
        predicted_s=0.5,
        raw_bytes=4096,
        json='{"candidates": []}',
        outcome=worker_pb2.KvOutcome(observed_s=0.25, payload_bytes=512),
    )
    living = worker_pb2.KvDecision(transfer_id="r/1", peer="d0", profile="none", reason="no_profiles")
    async with fake_cluster(checkpoint, num_prefills=3) as cluster, Client(cluster.address) as client:
        cluster.prefills[1].kv_decisions = [living, decided]
        cluster.prefills[2].kv_decisions = [living]
        got = await client.kv_decisions()
        assert [(one.prefill_worker, one.transfer_id) for one in got] == [("p1", "r/1"), ("p1", "r/0"), ("p2", "r/1")]
        assert (got[0].predicted_s, got[0].observed_s, got[0].details) == (None, None, {})
        assert (got[1].predicted_s, got[1].observed_s, got[1].wire_bytes) == (0.5, 0.25, 512)
        assert got[1].details == {"candidates": []}
        assert [one.transfer_id for one in await client.kv_decisions("p1", last=1)] == ["r/1"]
        for name in ("p9", "d0"):
            with pytest.raises(InvalidRequest, match=name):
                await client.kv_decisions(name)
        await cluster.prefills[2].kill()
        await cluster.wait_live(3)
        assert {one.prefill_worker for one in await client.kv_decisions()} == {"p1"}
        with pytest.raises(WorkerLost):
            await client.kv_decisions("p2")


async def test_errors_are_typed(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address, max_retries=0) as client:
        with pytest.raises(InvalidRequest, match="top_p") as invalid:
            await client.generate_text("x", top_p=7.0)
        assert invalid.value.field == "sampling.top_p"
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await client.generate_text("x", max_tokens="many")  # type: ignore[arg-type]
        with pytest.raises(PromptTooLong) as too_long:
            await client.generate_text("x" * (MAX_MODEL_LEN + 1))
        assert too_long.value.field == "prompt"
        with pytest.raises(ModelNotFound):
            await client.generate_text("x", model="other")
        cluster.prefills[0].script.go.clear()
        running = asyncio.create_task(client.generate_text("x", request_id="twice", max_tokens=3))
        await cluster.prefills[0].wait_submitted()
        with pytest.raises(DuplicateRequest):
            await client.generate_text("x", request_id="twice")
        with pytest.raises(DeadlineExceeded):
            await client.generate_text("x", deadline_s=0.05)
        assert await client.abort("never seen") is False
        cluster.prefills[0].script.go.set()
        await running


async def test_refusals_keep_their_reason_and_hint(checkpoint: Path) -> None:
    async with (
        fake_cluster(
            checkpoint, num_prefills=0, num_decodes=0, max_queued_requests=1, no_workers_timeout_s=60
        ) as cluster,
        Client(cluster.address, max_retries=0) as client,
    ):
        rivals = [asyncio.create_task(client.generate_text("x", deadline_s=60)) for _ in range(2)]
        done, waiting = await asyncio.wait(rivals, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), len(waiting)) == (1, 1)
        with pytest.raises(RejectedError) as refused:
            await done.pop()
        assert refused.value.reason == "queue_full"
        assert refused.value.retry_after_s > 0
        assert (await client.status()).queued_requests == 1
        for rival in waiting:
            rival.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_retries_before_the_first_token_only(checkpoint: Path) -> None:
    told: list[tuple[ServingError, float]] = []
    async with (
        fake_cluster(checkpoint, num_prefills=0, num_decodes=0, no_workers_timeout_s=0) as cluster,
        Client(cluster.address, max_retries=2, on_retry=lambda *why: told.append(why)) as client,
    ):
        with pytest.raises(NoWorkers):
            await client.generate_text("x")
        assert [type(error) for error, _ in told] == [NoWorkers, NoWorkers]
        assert all(wait_s > 0 for _, wait_s in told)
        text = cluster.gateway.metrics.registry.get_sample_value(
            "tandem_gateway_rejected_total", {"reason": "no_workers"}
        )
        assert text == 3
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address, max_retries=2) as client:
        cluster.decodes[0].steps_allowed = asyncio.Semaphore(1)
        received = 0

        async def read() -> None:
            nonlocal received
            async for piece in client.generate("x", max_tokens=8):
                received += len(piece.tokens)
                if received == 2:
                    await cluster.decodes[0].kill()

        with pytest.raises(WorkerLost):
            await read()
        assert received == 2
        assert len(cluster.prefills[0].submits) == 1


async def test_the_command_says_what_it_waits_for(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0, no_workers_timeout_s=0) as cluster:
        command = ["generate", "x", "--address", cluster.address]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert isinstance(result.exception, NoWorkers)
        assert re.fullmatch(r"(refused for now: .+; trying again in \d+\.\d s\n){2}", result.stderr)
        assert result.stdout == ""


async def test_leaving_the_loop_aborts(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Client(cluster.address) as client:
        cluster.decodes[0].steps_allowed = asyncio.Semaphore(1)
        async with aclosing(client.generate("x", max_tokens=8, request_id="left")) as pieces:
            async for _ in pieces:
                break
        await cluster.decodes[0].wait_aborted("left")


async def test_examples_run(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        assert len(await examples.stream_text.main(cluster.address)) == 48
        assert len(await examples.chat.main(cluster.address)) == 48
        assert len(await examples.logprobs.main(cluster.address)) == 8
        assert len(await examples.choices.main(cluster.address)) == 3
        assert len(await examples.resumable.main(cluster.address)) == 48
        assert await examples.prompt_scores.main(cluster.address) > 1.0
        first, second = await examples.seeded_sampling.main(cluster.address)
        assert first == second
        cluster.decodes[0].steps_allowed = asyncio.Semaphore(1)
        assert 1 <= await examples.abort.main(cluster.address) <= 2
