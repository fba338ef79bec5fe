"""The gateway over real gRPC when things go wrong: lost workers, clients that leave, deadlines, broken peers."""

import asyncio
import dataclasses
from pathlib import Path

import grpc
import pytest

from core.errors import RejectReason
from core.ids import WorkerId
from core.request import TokenOutput
from core.rpc import field_violations
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc, worker_pb2
from router.messages import WorkEvents
from tests.fakes.cluster import CLUSTER, fake_cluster, text_request
from tests.fakes.decode import FakeDecodeWorker
from tests.fakes.prefill import FakePrefillWorker
from tests.fakes.reading import Reading, collect, fails
from tests.fakes.script import refusal


async def test_a_prefill_worker_lost_before_the_first_token_is_replaced(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=2) as cluster:
        for worker in cluster.prefills:
            worker.script.go.clear()
        call = cluster.generate(text_request(request_id="r"))
        await cluster.decodes[0].wait_submitted()
        await asyncio.wait(
            [asyncio.create_task(worker.wait_submitted()) for worker in cluster.prefills],
            return_when=asyncio.FIRST_COMPLETED,
        )
        victim, survivor = sorted(cluster.prefills, key=lambda worker: not worker.submits)
        survivor.script.go.set()
        await victim.kill()
        await call.read_all()
        assert (call.text, call.indices) == ("abcde", [0, 1, 2, 3, 4])
        assert call.finished.placement.prefill_worker == survivor.worker_id
        assert call.finished.placement.attempts == 2
        first, second = (submit.transfer_id for submit in cluster.decodes[0].submits)
        assert (first.split(".")[0], second.split(".")[0]) == ("r/0", "r/1")
        await cluster.decodes[0].wait_aborted("r")
        assert cluster.holds_nothing()


async def test_a_decode_worker_lost_before_the_first_token_is_replaced(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=2) as cluster:
        prefill = cluster.prefills[0]
        prefill.script.go.clear()
        call = cluster.generate(text_request(request_id="r"))
        await prefill.wait_submitted()
        victim, survivor = sorted(cluster.decodes, key=lambda worker: not worker.submits)
        await victim.kill()
        await prefill.wait_aborted("r")
        prefill.script.go.set()
        await call.read_all()
        assert call.indices == [0, 1, 2, 3, 4]
        assert call.finished.placement.decode_worker == survivor.worker_id


async def test_a_prompt_that_kills_workers_does_not_kill_them_all(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=4, workers={"max_losses": 1}) as cluster:
        failure = worker_pb2.WorkFailed(grpc_code="UNAVAILABLE", reason="engine died")
        for worker in cluster.prefills:
            worker.script.failure = failure
        error = await fails(cluster.inference.Generate(text_request()), grpc.StatusCode.UNAVAILABLE)
        assert "engine died" in (error.details() or "")
        assert sum(len(worker.submits) for worker in cluster.prefills) == 2
        assert cluster.holds_nothing()


async def test_a_prefill_worker_lost_in_the_hand_over_fails_the_request(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        prefill, decode = cluster.prefills[0], cluster.decodes[0]
        decode.script.go.clear()
        prefill.hands_over = False
        call = cluster.generate(text_request(request_id="r"))
        await call.read_tokens(1)
        await prefill.kill()
        error = await call.fails(grpc.StatusCode.UNAVAILABLE)
        assert "p0" in (error.details() or "")
        await decode.wait_aborted("r")
        assert decode.held == set()
        assert cluster.holds_nothing()


async def test_a_decode_worker_lost_in_mid_stream_fails_the_request(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=2) as cluster:
        for worker in cluster.decodes:
            worker.steps_allowed = asyncio.Semaphore(2)
        call = cluster.generate(text_request(max_tokens=9))
        await call.read_tokens(3)
        assert call.indices == [0, 1, 2]
        victim = next(worker for worker in cluster.decodes if worker.submits)
        await victim.kill()
        await call.fails(grpc.StatusCode.UNAVAILABLE)
        assert cluster.holds_nothing()
        survivor = next(worker for worker in cluster.decodes if worker is not victim)
        survivor.steps_allowed = asyncio.Semaphore(100)
        assert (await collect(cluster.inference.Generate(text_request()))).text == "abcde"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_leaves_frees_both_workers(checkpoint: Path, phase: str) -> None:
    async with fake_cluster(checkpoint) as cluster:
        prefill, decode = cluster.prefills[0], cluster.decodes[0]
        decode.steps_allowed = asyncio.Semaphore(1)
        prefill.hands_over = phase != "prefill"
        call = cluster.generate(text_request(request_id="r", max_tokens=9))
        if phase == "prefill":
            prefill.script.go.clear()
            await prefill.wait_submitted()
        else:
            await call.read_tokens(2)
        call.cancel()
        await decode.wait_aborted("r")
        if phase == "prefill":
            await prefill.wait_aborted("r")
        assert prefill.held == decode.held == set()
        assert cluster.holds_nothing()


async def test_abort_ends_the_stream_and_frees_both_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.prefills[0].script.go.clear()
        call = cluster.generate(text_request(request_id="r"))
        await cluster.prefills[0].wait_submitted()
        assert (await cluster.inference.Abort(pb.AbortRequest(request_id="r"))).found
        await call.fails(grpc.StatusCode.CANCELLED)
        await cluster.prefills[0].wait_aborted("r")
        await cluster.decodes[0].wait_aborted("r")
        assert not (await cluster.inference.Abort(pb.AbortRequest(request_id="r"))).found
        assert cluster.holds_nothing()


async def test_the_gateways_own_deadline_frees_both_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, request_timeout_s=0.1) as cluster:
        cluster.prefills[0].script.go.clear()
        call = cluster.generate(text_request(request_id="r"))
        error = await call.fails(grpc.StatusCode.DEADLINE_EXCEEDED)
        assert "prefilling" in (error.details() or "")
        await cluster.prefills[0].wait_aborted("r")
        await cluster.decodes[0].wait_aborted("r")


async def test_a_request_that_nobody_accepts_ends_at_its_deadline(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.decodes[0].script.always_refuse = refusal()
        await fails(cluster.inference.Generate(text_request(), timeout=0.2), grpc.StatusCode.DEADLINE_EXCEEDED)
        await cluster.wait_idle()
        assert cluster.holds_nothing()


async def test_without_workers_requests_wait_a_little_then_fail(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=0, no_workers_timeout_s=0.15) as cluster:
        waited = await fails(cluster.inference.Generate(text_request()), grpc.StatusCode.UNAVAILABLE)
        assert "decode" in (waited.details() or "")
        refused = await fails(cluster.inference.Generate(text_request()), grpc.StatusCode.UNAVAILABLE)
        assert "decode" in (refused.details() or "")
        decode = FakeDecodeWorker("d0", cluster.network, cluster.store, CLUSTER)
        cluster.others.append(decode)
        await decode.start()
        await cluster.wait_serving()
        assert (await collect(cluster.inference.Generate(text_request()))).text == "abcde"


async def test_requests_wait_for_the_first_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0, no_workers_timeout_s=60) as cluster:
        result = asyncio.create_task(collect(cluster.inference.Generate(text_request())))
        for worker in (
            FakePrefillWorker("p0", cluster.network, cluster.store, CLUSTER),
            FakeDecodeWorker("d0", cluster.network, cluster.store, CLUSTER),
        ):
            cluster.others.append(worker)
            await worker.start()
        assert (await result).text == "abcde"


async def test_a_worker_that_does_not_answer_is_passed_over(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=2, workers={"accept_timeout_s": 0.05}) as cluster:
        cluster.decodes[0].script.is_silent = True
        for index in range(4):
            got = await collect(cluster.inference.Generate(text_request(request_id=f"r{index}")))
            assert got.finished.placement.decode_worker == "d1"
        silenced = {submit.request.request_id for submit in cluster.decodes[0].submits}
        assert silenced, "the silent worker was never asked"
        assert {name for name, _ in cluster.decodes[0].aborts} == silenced


async def test_the_queue_is_bounded_in_tokens(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, max_queued_tokens=8) as cluster:
        cluster.decodes[0].script.is_silent = True
        waiting = cluster.generate(text_request("12345", request_id="first"))
        await cluster.decodes[0].wait_submitted()
        error = await fails(cluster.inference.Generate(text_request("6789")), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "8 tokens" in (error.details() or "")
        waiting.cancel()


async def test_a_slow_reader_is_cut_off_and_frees_the_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, max_unread_tokens=16, max_model_len=400) as cluster:
        cluster.network.padding_logprobs = 200  # big messages into a small window
        request = text_request(request_id="r", max_tokens=390)
        request.sampling.logprobs = 20
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
        async with grpc.aio.insecure_channel(cluster.address, options=options) as channel:
            call = Reading(inference_pb2_grpc.InferenceStub(channel).Generate(request))
            await call.read_tokens(1)
            await cluster.decodes[0].wait_aborted("r")
            assert cluster.holds_nothing()
            error = await call.fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert "unread" in (error.details() or "")


def repeat_an_index(tokens: tuple[TokenOutput, ...]) -> tuple[TokenOutput, ...]:
    return tuple(dataclasses.replace(token, index=min(token.index, 2)) for token in tokens)


def skip_an_index(tokens: tuple[TokenOutput, ...]) -> tuple[TokenOutput, ...]:
    return tuple(dataclasses.replace(token, index=token.index + (token.index > 1)) for token in tokens)


@pytest.mark.parametrize("garble", [repeat_an_index, skip_an_index])
async def test_token_indices_with_a_gap_or_repeat_are_refused(checkpoint: Path, garble: object) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.decodes[0].script.garble = garble  # type: ignore[assignment]
        call = cluster.generate(text_request(request_id="r", max_tokens=9))
        error = await call.fails(grpc.StatusCode.INTERNAL)
        assert "expected token" in (error.details() or "")
        await cluster.decodes[0].wait_aborted("r")


@pytest.mark.parametrize(
    ("grpc_code", "expected"),
    [
        ("INTERNAL", grpc.StatusCode.INTERNAL),
        ("INVALID_ARGUMENT", grpc.StatusCode.INVALID_ARGUMENT),
        ("OUT_OF_RANGE", grpc.StatusCode.OUT_OF_RANGE),
        ("DEADLINE_EXCEEDED", grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_failures_that_any_worker_would_have_are_not_retried(
    checkpoint: Path, grpc_code: str, expected: grpc.StatusCode
) -> None:
    async with fake_cluster(checkpoint, num_prefills=2) as cluster:
        for worker in cluster.prefills:
            worker.script.failure = worker_pb2.WorkFailed(grpc_code=grpc_code, reason="scripted", detail="so")
        error = await fails(cluster.inference.Generate(text_request(request_id="r")), expected)
        assert "scripted: so" in (error.details() or "")
        assert sum(len(worker.submits) for worker in cluster.prefills) == 1
        await cluster.decodes[0].wait_aborted("r")


async def test_a_request_that_all_workers_call_too_long_fails_at_once(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=2) as cluster:
        for worker in cluster.decodes:
            worker.script.always_refuse = refusal(RejectReason.TOO_LONG)
        await fails(cluster.inference.Generate(text_request()), grpc.StatusCode.OUT_OF_RANGE)


async def test_violations_name_their_field(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0) as cluster:
        request = text_request()
        request.sampling.min_p = 2.0
        error = await fails(cluster.inference.Generate(request), grpc.StatusCode.INVALID_ARGUMENT)
        assert [name for name, _ in field_violations(error)] == ["sampling.min_p"]


async def test_a_defect_of_the_gateway_costs_a_link_once_and_leaves_a_traceback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_cluster(checkpoint) as cluster:
        dispatcher, prefill = cluster.gateway.dispatcher, cluster.prefills[0]
        on_work_events, defects = dispatcher.on_work_events, [RuntimeError("a defect")]

        def break_once(worker_id: WorkerId, events: WorkEvents) -> None:
            if worker_id == prefill.worker_id and defects:
                raise defects.pop()
            on_work_events(worker_id, events)

        monkeypatch.setattr(dispatcher, "on_work_events", break_once)
        assert (await collect(cluster.inference.Generate(text_request()))).text == "abcde"
        assert len(prefill.gateways) == 2, "the link was opened again"
        logged = [record for record in caplog.records if record.exc_info and "a defect" in str(record.exc_info[1])]
        assert len(logged) == 1
        assert cluster.holds_nothing()
