"""The public door when calls overlap: old calls, slow readers, aborts that come early. The context is ours, so that
the moment at which a write returns is the test's to choose; all behind it is real."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from core.errors import SlowReader
from protos import inference_pb2 as pb
from router.access.principal import ANYONE, set_current_principal
from router.intake import GenerateCall, Intake, Prepared
from router.rpc.inference import InferenceServicer
from tests.fakes.cluster import FakeCluster, fake_cluster, text_request
from tests.fakes.reading import fails
from tests.fakes.script import PATIENCE_S


class StuckContext:
    """A call whose client stops reading at the first message that `is_stuck_at` picks."""

    def __init__(self, is_stuck_at: Callable[[pb.GenerateResponse], bool]) -> None:
        self.stuck = asyncio.Event()
        self.aborted: grpc.StatusCode | None = None
        self._is_stuck_at = is_stuck_at

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, message: pb.GenerateResponse) -> None:
        if self._is_stuck_at(message):
            self.stuck.set()
            await asyncio.Event().wait()

    def set_trailing_metadata(self, metadata: object) -> None: ...

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.aborted = code
        await asyncio.Event().wait()  # the status queues up behind the unread message


def begin(cluster: FakeCluster, context: StuckContext, request: pb.GenerateRequest) -> asyncio.Task[None]:
    set_current_principal(ANYONE)
    servicer = InferenceServicer(cluster.gateway.front)
    return asyncio.create_task(servicer.Generate(request, cast("Any", context)))


async def test_the_end_of_an_old_call_does_not_abort_a_newer_request_of_its_id(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        context = StuckContext(lambda message: message.HasField("finished"))
        old = begin(cluster, context, text_request(request_id="same"))
        async with asyncio.timeout(PATIENCE_S):
            await context.stuck.wait()
        cluster.prefills[0].script.go.clear()
        newer = cluster.generate(text_request(request_id="same"))
        await cluster.prefills[0].wait_submitted(2)
        old.cancel()
        await asyncio.wait([old], timeout=PATIENCE_S)
        assert old.cancelled()
        cluster.prefills[0].script.go.set()
        await newer.read_all()
        assert newer.text == "abcde"


async def test_a_reader_that_never_reads_does_not_keep_its_call(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, write_timeout_s=0.05) as cluster:
        context = StuckContext(lambda message: message.HasField("delta"))
        call = begin(cluster, context, text_request())
        done, _ = await asyncio.wait([call], timeout=PATIENCE_S)
        assert done
        assert context.aborted is grpc.StatusCode.RESOURCE_EXHAUSTED == grpc.StatusCode[SlowReader.grpc_code]
        await cluster.wait_idle()


async def test_only_a_message_that_waits_counts_not_the_worker_behind_it(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, write_timeout_s=0.05) as cluster:
        decode = cluster.decodes[0]
        decode.script.go.clear()
        context = StuckContext(lambda message: message.HasField("finished"))
        call = begin(cluster, context, text_request())
        await decode.wait_submitted()
        await asyncio.sleep(0.2)  # several times the patience, and nothing to write
        assert not call.done()
        decode.script.go.set()
        async with asyncio.timeout(PATIENCE_S):
            await context.stuck.wait()
        await asyncio.wait([call], timeout=PATIENCE_S)
        assert context.aborted is grpc.StatusCode.RESOURCE_EXHAUSTED, "now one waits"
        await cluster.wait_idle()


async def test_an_abort_that_comes_while_the_prompt_is_tokenised_is_honoured(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = asyncio.Event(), asyncio.Event()
    prepare = Intake.prepare

    async def slow_prepare(intake: Intake, call: GenerateCall) -> Prepared:
        begun.set()
        await go.wait()
        return await prepare(intake, call)

    monkeypatch.setattr(Intake, "prepare", slow_prepare)
    async with fake_cluster(checkpoint) as cluster:
        call = cluster.generate(text_request(request_id="early"))
        reading = asyncio.create_task(call.fails(grpc.StatusCode.CANCELLED))
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
        await fails(cluster.inference.Generate(text_request(request_id="early")), grpc.StatusCode.ALREADY_EXISTS)
        assert (await cluster.inference.Abort(pb.AbortRequest(request_id="early"))).found
        go.set()
        await reading
        assert not (await cluster.inference.Abort(pb.AbortRequest(request_id="early"))).found
        assert all(not worker.submits for worker in cluster.workers)
