"""A `ServingError` raised in a servicer reaches a real client as the right status with its details."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core import errors, rpc

CASES = [
    (errors.InvalidRequest("sampling.top_p", "too big"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidRequest("a", "bad", others=(("b", "worse"),)), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.PromptTooLong("prompt", "5000 tokens"), grpc.StatusCode.OUT_OF_RANGE),
    (errors.ModelNotFound("no model x"), grpc.StatusCode.NOT_FOUND),
    (errors.RejectedError(errors.RejectReason.QUEUE_FULL, "", 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.WorkerLost("decode-0 died"), grpc.StatusCode.UNAVAILABLE),
    (errors.Aborted("by Abort"), grpc.StatusCode.CANCELLED),
]


class Failing(health_pb2_grpc.HealthServicer):
    """Health has one plain call, and is nobody's to change here."""

    def __init__(self, error: errors.ServingError) -> None:
        self.error = error

    async def Check(  # noqa: N802 (the name is the protocol's)
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> health_pb2.HealthCheckResponse:
        async with rpc.reply_errors(context):
            raise self.error
        raise AssertionError("unreachable")


async def served(error: errors.ServingError) -> AsyncIterator[str]:
    server = rpc.create_server()
    health_pb2_grpc.add_HealthServicer_to_server(Failing(error), server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(grace=0)


@pytest.mark.parametrize(("error", "code"), CASES, ids=[type(error).__name__ for error, _ in CASES])
async def test_status_and_details_arrive(error: errors.ServingError, code: grpc.StatusCode) -> None:
    async for address in served(error):
        async with rpc.connect(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs are untyped
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert caught.value.code() is code
        assert caught.value.details() == str(error)
        violations = rpc.field_violations(caught.value)
        if isinstance(error, errors.InvalidRequest):
            assert violations == list(error.violations)
        else:
            assert violations == []


@pytest.mark.parametrize("letter", ["x", "é", "漢", "😀"])
async def test_a_long_message_is_cut_and_the_status_kept(letter: str) -> None:
    for error, code in (
        (errors.ModelNotFound(f"no model {letter * 10_000}"), grpc.StatusCode.NOT_FOUND),
        (errors.InvalidRequest("chat", letter * 10_000), grpc.StatusCode.INVALID_ARGUMENT),
        (
            errors.InvalidRequest(letter * 10_000, "x", others=((letter * 10_000, letter * 10_000),) * 50),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ):
        async for address in served(error):
            async with rpc.connect(address) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs are untyped
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert caught.value.code() is code
            details = caught.value.details() or ""
            assert details.endswith(f"{letter}...")
            assert len(details.encode()) <= 1003


async def test_a_taken_port_is_a_config_error() -> None:
    first, second = rpc.create_server(), rpc.create_server()
    port = rpc.bind(first, "127.0.0.1", 0)
    with pytest.raises(errors.ConfigError, match=f"127.0.0.1:{port}"):
        rpc.bind(second, "127.0.0.1", port)
    await first.stop(grace=0)
    await second.stop(grace=0)
