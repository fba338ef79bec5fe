"""A client whose machine vanishes says nothing: no end of its stream, no end of its connection."""

from pathlib import Path

import grpc
import pytest

from core.rpc import connect
from protos import inference_pb2_grpc
from tests.fakes.cluster import fake_cluster, text_request
from tests.fakes.reading import Reading
from tests.fakes.tcp_proxy import tcp_proxy

NOTICED_WITHIN_S = 40.0  # keepalive asks after 5 s of silence and waits 10 s; the machine may be busy


@pytest.mark.slow
async def test_keepalive_notices_and_frees_the_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, tcp_proxy(cluster.address) as proxy:
        cluster.decodes[0].script.go.clear()
        async with connect(proxy.address) as channel:
            reading = Reading(inference_pb2_grpc.InferenceStub(channel).Generate(text_request(request_id="lost")))
            await reading.read_tokens(1)
            proxy.is_silent = True
            assert await cluster.gateway.dispatcher.wait_idle(NOTICED_WITHIN_S)
            await cluster.decodes[0].wait_aborted("lost")
            assert cluster.holds_nothing()
            error = await reading.fails(grpc.StatusCode.UNAVAILABLE)
            assert error.code() is grpc.StatusCode.UNAVAILABLE, "the client notices, too"
