"""Two gateway processes, of which the one that serves a resumable request is killed."""

import asyncio

import grpc
import pytest

from benchmarks.paced_worker import Pace
from benchmarks.replica_bed import bed
from core.rpc import connect
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.fakes.resuming import ResumingReader

pytestmark = pytest.mark.slow
BOUND_S = 10.0  # silent_after_s of gateways, and patience with one that was just met


async def test_what_a_killed_gateway_had_saved_is_delivered_and_then_the_reason() -> None:
    async with bed(2, 1, 1, Pace()) as cluster:
        owner, other = cluster.gateways
        sampling = pb.SamplingParams(temperature=0.0, max_tokens=1900, ignore_eos=True)
        asked = pb.GenerateRequest(
            request_id="r",
            token_ids=pb.TokenIds(ids=range(300, 400)),
            sampling=sampling,
            terms=pb.RequestTerms(resume_window_s=60.0),
        )
        reader, along = ResumingReader("r"), ResumingReader("r")
        async with connect(owner.address) as there, connect(other.address) as here:
            await reader.begin(there, asked, 20)
            reading = asyncio.create_task(along.fails(here))
            await reader.resume(here, 20)
            await owner.kill()
            async with asyncio.timeout(BOUND_S):
                assert not (await inference_pb2_grpc.InferenceStub(here).Abort(pb.AbortRequest(request_id="r"))).found
                for code, why in (await reading, await reader.fails(here)):
                    assert code is grpc.StatusCode.UNAVAILABLE
                    assert "which served the request, is gone" in why
            assert reader.numbers == list(range(len(reader.events)))
            assert along.events == reader.events, "whoever read along had all of it"
            assert len(reader.events) >= 40
            status = await other.status()
            assert status.active_requests == 0
