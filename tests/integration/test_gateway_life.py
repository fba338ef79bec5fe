"""The life of a gateway and of its workers: restarts, health, a lost store, stopping, ports, metrics."""

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from core.clock import MonotonicClock
from core.errors import ConfigError
from core.membership import WorkerState
from core.store_memory import MemoryStore
from protos import admin_pb2
from router.config import RouterConfig
from router.service import Gateway
from tests.fakes.cluster import CLUSTER, fake_cluster, text_request
from tests.fakes.decode import FakeDecodeWorker
from tests.fakes.prefill import FakePrefillWorker
from tests.fakes.reading import collect, fails
from tests.fakes.script import PATIENCE_S


async def test_draining_and_restarted_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=2) as cluster:
        draining, other = cluster.decodes
        await draining.register(WorkerState.DRAINING)
        await cluster.wait_live(2)
        for _ in range(4):
            got = await collect(cluster.inference.Generate(text_request()))
            assert got.finished.placement.decode_worker == other.worker_id
        await draining.kill()
        reborn = FakeDecodeWorker("d0", cluster.network, cluster.store, CLUSTER, epoch=2)
        cluster.others.append(reborn)
        await reborn.start()
        await cluster.wait_live(3)
        await other.register(WorkerState.DRAINING)
        await cluster.wait_live(2)
        assert (await collect(cluster.inference.Generate(text_request()))).finished.placement.decode_worker == "d0"
        assert len(reborn.submits) == 1


async def test_a_newer_epoch_fences_the_old_incarnation_at_once(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        old = cluster.decodes[0]
        old.steps_allowed = asyncio.Semaphore(1)
        call = cluster.generate(text_request(max_tokens=9))
        await call.read_tokens(2)
        heir = FakeDecodeWorker("d0", cluster.network, cluster.store, CLUSTER, epoch=2)
        cluster.others.append(heir)
        await heir.start()
        await call.fails(grpc.StatusCode.UNAVAILABLE)
        await cluster.wait_live(2)
        assert (await collect(cluster.inference.Generate(text_request()))).text == "abcde"
        assert len(heir.submits) == 1


async def test_health_follows_the_workers(checkpoint: Path) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with fake_cluster(checkpoint) as cluster:
        for service in ("", "tandem.v1.Inference"):
            await cluster.wait_health(serving, service)
        await cluster.prefills[0].kill()
        for service in ("", "tandem.v1.Inference"):
            await cluster.wait_health(not_serving, service)
        await cluster.wait_health(serving, "tandem.v1.Admin")
        reborn = FakePrefillWorker("p0", cluster.network, cluster.store, CLUSTER, epoch=2)
        cluster.others.append(reborn)
        await reborn.start()
        await cluster.wait_health(serving)


async def test_the_store_may_go_away(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, mirror={"poll_interval_s": 0.01, "forget_after_s": 0}) as cluster:
        before = (await cluster.admin.GetClusterStatus(admin_pb2.GetClusterStatusRequest())).store_staleness_s
        cluster.store.set_available(False)
        assert (await collect(cluster.inference.Generate(text_request()))).text == "abcde"
        while (await cluster.admin.GetClusterStatus(admin_pb2.GetClusterStatusRequest())).store_staleness_s < 0.1:
            assert (await collect(cluster.inference.Generate(text_request()))).text == "abcde"
        assert before < 0.1
        cluster.store.set_available(True)
        fresh = FakeDecodeWorker("d9", cluster.network, cluster.store, CLUSTER)
        cluster.others.append(fresh)
        await fresh.start()
        await cluster.wait_live(3)
        assert (await cluster.admin.GetClusterStatus(admin_pb2.GetClusterStatusRequest())).store_staleness_s < 0.1


async def test_a_record_that_left_the_store_does_not_cut_a_live_stream(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, mirror={"forget_after_s": 0}) as cluster:
        decode = cluster.decodes[0]
        decode.steps_allowed = asyncio.Semaphore(1)
        call = cluster.generate(text_request())
        await call.read_tokens(2)
        await decode.deregister()
        await cluster.wait_live(1)
        for _ in range(10):
            decode.steps_allowed.release()
        await call.read_all()
        assert call.text == "abcde"


async def test_stopping_lets_running_requests_finish_and_refuses_new_ones(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        decode = cluster.decodes[0]
        decode.steps_allowed = asyncio.Semaphore(1)
        call = cluster.generate(text_request())
        await call.read_tokens(2)
        stopping = asyncio.create_task(cluster.gateway.stop(PATIENCE_S))
        await cluster.wait_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await fails(cluster.inference.Generate(text_request()), grpc.StatusCode.UNAVAILABLE)
        for _ in range(10):
            decode.steps_allowed.release()
        await call.read_all()
        assert call.text == "abcde"
        await stopping
        await cluster.gateway.run()  # returns: it is stopped


async def test_stopping_aborts_what_does_not_finish(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.prefills[0].script.go.clear()
        call = cluster.generate(text_request(request_id="r"))
        await cluster.prefills[0].wait_submitted()
        await cluster.gateway.stop(0.0)
        await call.fails(grpc.StatusCode.CANCELLED)
        await cluster.prefills[0].wait_aborted("r")


async def test_a_taken_port_is_one_clear_error(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for settings in ({"port": port}, {"port": 0, "metrics_port": port}):
            config = RouterConfig(model_path=checkpoint, **settings)
            with pytest.raises(ConfigError, match=str(port)):
                await Gateway(config, CLUSTER, MemoryStore(), MonotonicClock()).start()


async def test_metrics_are_served(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, metrics_port=0) as cluster:
        await collect(cluster.inference.Generate(text_request("four and ", max_tokens=3)))
        await fails(cluster.inference.Generate(text_request(model="other")), grpc.StatusCode.NOT_FOUND)
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.gateway.metrics_port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
    for line in (
        'tandem_gateway_requests_total{outcome="finished",reason="length"} 1.0',
        'tandem_gateway_rejected_total{reason="not_found"} 1.0',
        "tandem_gateway_time_to_first_token_seconds_count 1.0",
        "tandem_gateway_output_tokens_total 3.0",
        "tandem_router_kv_transfer_bytes_total 9216.0",
        'tandem_router_live_workers{role="prefill"} 1.0',
        'tandem_gateway_queued_by_class{service_class="batch"} 0.0',
        'mode="remote_prefill",mode_reason="only_possible",reason="only_candidate"} 1.0',
        "tandem_router_open_breakers 0.0",
    ):
        assert line in page
