"""A channel to the gateways, and what goes with every call on it."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from typing import TypeVar

import grpc

from core.errors import ConfigError
from core.rpc import connect
from core.tls import ClientTls
from protos import admin_pb2_grpc, inference_pb2_grpc
from protos import inference_pb2 as pb
from tandem_client.options import Options
from tandem_client.statuses import error_of
from tandem_client.streaming import Attempts, Event, Resumption, Retries

T = TypeVar("T")
E = TypeVar("E", bound=Event)


class Connection:
    """What `Client` calls with. Its arguments are the client's.

    Raises:
        ConfigError: an address or a key that cannot be one.
    """

    def __init__(
        self, address: str, *, timeout_s: float, retries: Retries, tenant: str, api_key: str, tls: ClientTls | None
    ) -> None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("api_key: has characters that no key has")
        self.tenant = tenant
        self._timeout_s = timeout_s
        self._retries = retries
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._channel = connect(address, tls)
        self.inference = inference_pb2_grpc.InferenceStub(self._channel)
        self.admin = admin_pb2_grpc.AdminStub(self._channel)

    async def close(self) -> None:
        """End everything that is still running."""
        await self._channel.close()

    async def told(self, method: Callable[..., Awaitable[T]], request: object) -> T:
        """Call a method with one answer. Raises: ServingError."""
        try:
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error

    def events(
        self,
        method: Callable[..., AsyncIterable[E]],
        request: object,
        options: Options,
        resumption: Resumption[E] | None,
    ) -> AsyncGenerator[E, None]:
        """Call a streaming method."""

        def begin(timeout_s: float | None) -> AsyncIterable[E]:
            return method(request, timeout=timeout_s, metadata=self._metadata)

        attempts = Attempts(begin, self._retries, deadline_s=options.get("deadline_s"), resumption=resumption)
        return attempts.events()

    def resumption(
        self, request: pb.GenerateRequest | pb.ChatRequest, event_of: Callable[[pb.ResumeResponse], E]
    ) -> Resumption[E] | None:
        """None, unless the request asks for it. It gets a name then, to be asked for by."""
        if not request.terms.resume_window_s > 0:
            return None
        request_id = request.request_id = request.request_id or f"req-{uuid.uuid4().hex}"

        def resume(last: int | None, timeout_s: float | None) -> AsyncIterable[pb.ResumeResponse]:
            asked = pb.ResumeRequest(request_id=request_id, last_event_index=last, tenant=self.tenant)
            return self.inference.Resume(asked, timeout=timeout_s, metadata=self._metadata)

        def abort() -> Awaitable[object]:
            return self.told(self.inference.Abort, pb.AbortRequest(request_id=request_id, tenant=self.tenant))

        return Resumption(request.terms.resume_window_s, resume, event_of, abort)
