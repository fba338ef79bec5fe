"""A channel to several addresses: calls go to them in turn, and to the others once one is gone."""

from collections import Counter
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core import rpc
from core.errors import ConfigError


class Named(health_pb2_grpc.HealthServicer):
    """Counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> health_pb2.HealthCheckResponse:
        self.num_calls += 1
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def test_calls_go_round_and_around_the_dead() -> None:
    servers, services, ports = [], [Named(), Named()], []
    for service in services:
        server = rpc.create_server()
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        ports.append(rpc.bind(server, "127.0.0.1", 0))
        await server.start()
        servers.append(server)
    async with rpc.connect(", ".join(f"127.0.0.1:{port}" for port in ports)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs are untyped
        for _ in range(40):
            await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=10)
        assert min(service.num_calls for service in services) > 0, Counter(s.num_calls for s in services)
        await servers[0].stop(grace=0)
        before = services[1].num_calls
        for _ in range(10):
            await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=10)
        assert services[1].num_calls == before + 10
    await servers[1].stop(grace=0)


@pytest.mark.parametrize("address", ["gateway-a:1,gateway-b:1", "127.0.0.1:1,[::1]:1", "127.0.0.1:1,"])
def test_what_cannot_be_one_target_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"addresses must be numeric|cannot be mixed"):
        rpc.connect(address)
