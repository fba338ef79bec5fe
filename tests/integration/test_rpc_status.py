"""A `ServingError` raised in a servicer reaches a real client as the right status with its details."""

from collections.abc import AsyncIterator

import grpc
import pytest

from core import errors, rpc
from protos import admin_pb2, admin_pb2_grpc

CASES = [
    (errors.InvalidRequest("sampling.top_p", "too big"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidRequest("a", "bad", others=(("b", "worse"),)), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.PromptTooLong("prompt", "5000 tokens"), grpc.StatusCode.OUT_OF_RANGE),
    (errors.ModelNotFound("no model x"), grpc.StatusCode.NOT_FOUND),
    (errors.RejectedError(errors.RejectReason.QUEUE_FULL, "", 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.WorkerLost("decode-0 died"), grpc.StatusCode.UNAVAILABLE),
    (errors.Aborted("by Abort"), grpc.StatusCode.CANCELLED),
]


class Failing(admin_pb2_grpc.AdminServicer):
    def __init__(self, error: errors.ServingError) -> None:
        self.error = error

    async def GetClusterStatus(  # noqa: N802 (the name is the protocol's)
        self,
        request: admin_pb2.GetClusterStatusRequest,
        context: grpc.aio.ServicerContext[admin_pb2.GetClusterStatusRequest, admin_pb2.GetClusterStatusResponse],
    ) -> admin_pb2.GetClusterStatusResponse:
        async with rpc.reply_errors(context):
            raise self.error
        raise AssertionError("unreachable")

    async def ListKvDecisions(  # noqa: N802
        self,
        request: admin_pb2.AdminListKvDecisionsRequest,
        context: grpc.aio.ServicerContext[
            admin_pb2.AdminListKvDecisionsRequest, admin_pb2.AdminListKvDecisionsResponse
        ],
    ) -> admin_pb2.AdminListKvDecisionsResponse:
        raise AssertionError("nobody asks")

    async def ExplainRequest(  # noqa: N802
        self,
        request: admin_pb2.ExplainRequestRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ExplainRequestRequest, admin_pb2.ExplainRequestResponse],
    ) -> admin_pb2.ExplainRequestResponse:
        raise AssertionError("nobody asks")

    async def CreateApiKey(  # noqa: N802
        self,
        request: admin_pb2.CreateApiKeyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.CreateApiKeyRequest, admin_pb2.CreateApiKeyResponse],
    ) -> admin_pb2.CreateApiKeyResponse:
        raise AssertionError("nobody asks")

    async def ListApiKeys(  # noqa: N802
        self,
        request: admin_pb2.ListApiKeysRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ListApiKeysRequest, admin_pb2.ListApiKeysResponse],
    ) -> admin_pb2.ListApiKeysResponse:
        raise AssertionError("nobody asks")

    async def RevokeApiKey(  # noqa: N802
        self,
        request: admin_pb2.RevokeApiKeyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.RevokeApiKeyRequest, admin_pb2.RevokeApiKeyResponse],
    ) -> admin_pb2.RevokeApiKeyResponse:
        raise AssertionError("nobody asks")


async def served(error: errors.ServingError) -> AsyncIterator[str]:
    server = rpc.create_server()
    admin_pb2_grpc.add_AdminServicer_to_server(Failing(error), server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(grace=0)


@pytest.mark.parametrize(("error", "code"), CASES, ids=[type(error).__name__ for error, _ in CASES])
async def test_status_and_details_arrive(error: errors.ServingError, code: grpc.StatusCode) -> None:
    async for address in served(error):
        async with rpc.connect(address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetClusterStatus(admin_pb2.GetClusterStatusRequest(), timeout=5)
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
                stub = admin_pb2_grpc.AdminStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GetClusterStatus(admin_pb2.GetClusterStatusRequest(), timeout=5)
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
