"""Bytes that are no request of their method: INVALID_ARGUMENT, where gRPC by itself would say that we failed."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from core.errors import InvalidRequest
from core.rpc import reply_errors

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler = Any  # grpc.RpcMethodHandler is generic in the type stubs only


class _Undecodable(NamedTuple):
    """Stands for a request that could not be read."""

    why: str


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Has every method with one request refuse bytes that are none."""

    def __init__(self) -> None:
        self._careful: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        method = handler_call_details.method
        if (careful := self._careful.get(method)) is not None:
            return careful
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        careful = self._careful[method] = _careful(handler)
        return careful


def _careful(handler: _Handler) -> _Handler:
    """Return the same method, which reads with care."""
    behavior = handler.unary_stream if handler.response_streaming else handler.unary_unary
    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler

    async def checked(request: Any, context: _Context) -> Any:
        if isinstance(request, _Undecodable):
            async with reply_errors(context):
                raise InvalidRequest("request", f"is no message of this method: {request.why}")
        return await behavior(request, context)

    return make(checked, _reader(handler.request_deserializer), handler.response_serializer)


def _reader(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return read
