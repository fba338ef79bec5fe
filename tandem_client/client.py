"""The client: a connection to the gateways of one cluster, any number of generations at once."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, Unpack

import grpc

from core.errors import Aborted, DeadlineExceeded, RejectedError, ServingError
from core.rpc import connect
from protos import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos import inference_pb2 as pb
from tandem_client import rpc
from tandem_client.sampling import Sampling
from tandem_client.types import (
    ClusterStatus,
    Generation,
    KvDecision,
    Message,
    ModelInfo,
    Piece,
    RouteDecision,
    Service,
    Token,
)

_BACKOFF_S = 0.05
_ANY_SERVICE = Service()


class Client:
    """A connection to a gateway.

    Args:
        address: host:port; or of several gateways of one cluster, separated by commas: calls go to them in turn.
        timeout_s: of the calls that are no generation.
        max_retries: how often a generation that was refused for now (or whose gateway cannot be reached) is tried again
            before its first token. After the first token nothing is ever tried again.
        tenant: on whose account everything goes.
        on_retry: told why a generation was refused for now, and the seconds until it is tried again.

    Every method raises a `ServingError` of the kind that the gateway reported.
    Concurrency: one event loop; calls may overlap.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 10.0,
        max_retries: int = 2,
        tenant: str = "",
        on_retry: Callable[[ServingError, float], None] = lambda _, __: None,
    ) -> None:
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._tenant = tenant
        self._on_retry = on_retry
        self._channel = connect(address)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything that is still running."""
        await self._channel.close()

    async def generate(
        self,
        prompt: rpc.Prompt,
        *,
        model: str = "",
        request_id: str = "",
        deadline_s: float | None = None,
        kv_quality: str | float | None = None,
        handoff_budget_s: float | None = None,
        service: Service = _ANY_SERVICE,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Piece, None]:
        """Stream a generation. Leaving the loop early aborts it (use `contextlib.aclosing` to be sure when).

        Args:
            prompt: text, token ids, or `Message`s of a chat.
            request_id: a name of yours for `abort` and logs; empty: the gateway makes one.
            deadline_s: for all of it, retries included; the gateway's default otherwise.
            kv_quality: of the KV cache on its way between two workers: exact, high, balanced, or the least token
                agreement of its compression profile, in [0, 1]; the cluster's default otherwise.
            handoff_budget_s: the KV cache may arrive so long after the first token; as soon as it can otherwise.
            service: what it is for, and what it needs.
        """
        request = rpc.generate_request(
            prompt,
            model,
            request_id,
            sampling,
            kv_quality=kv_quality,
            handoff_budget_s=handoff_budget_s,
            tenant=self._tenant,
            service=service,
        )
        loop = asyncio.get_running_loop()
        ends_at = None if deadline_s is None else loop.time() + deadline_s
        for retries_left in range(self._max_retries, -1, -1):
            left_s = None if ends_at is None else max(0.0, ends_at - loop.time())
            has_begun = False
            try:
                async with aclosing(self._stream(request, left_s)) as pieces:
                    async for piece in pieces:
                        has_begun = True
                        yield piece
                return
            except ServingError as error:
                if has_begun or not error.retryable or not retries_left:
                    raise
                wait_s = max(_retry_after_s(error), _BACKOFF_S * 2 ** (self._max_retries - retries_left))
                wait_s *= random.uniform(1.0, 1.5)
                if ends_at is not None and loop.time() + wait_s >= ends_at:
                    raise
                self._on_retry(error, wait_s)
            await asyncio.sleep(wait_s)

    async def generate_text(
        self,
        prompt: rpc.Prompt,
        *,
        model: str = "",
        request_id: str = "",
        deadline_s: float | None = None,
        kv_quality: str | float | None = None,
        handoff_budget_s: float | None = None,
        service: Service = _ANY_SERVICE,
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """Generate to the end and return it whole."""
        texts: list[str] = []
        tokens: list[Token] = []
        stream = self.generate(
            prompt,
            model=model,
            request_id=request_id,
            deadline_s=deadline_s,
            kv_quality=kv_quality,
            handoff_budget_s=handoff_budget_s,
            service=service,
            **sampling,
        )
        async for piece in stream:
            texts.append(piece.text)
            tokens.extend(piece.tokens)
            if piece.summary is not None:
                return Generation("".join(texts), tuple(tokens), piece.summary)
        raise ServingError("the stream ended without saying how")

    async def abort(self, request_id: str) -> bool:
        """End a generation by its name. Returns whether it was running."""
        request = pb.AbortRequest(request_id=request_id)
        try:
            return (await self._inference.Abort(request, timeout=self._timeout_s)).found
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error) from error

    async def model_info(self, model: str = "") -> ModelInfo:
        """Return the facts about the model served."""
        request = pb.GetModelInfoRequest(model=model)
        try:
            return rpc.model_info_of(await self._inference.GetModelInfo(request, timeout=self._timeout_s))
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error) from error

    async def tokenize(self, prompt: str | Sequence[Message], *, model: str = "") -> list[int]:
        """Return the token ids of a prompt as the model would see it."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(rpc.chat_messages(prompt))
        try:
            return list((await self._inference.Tokenize(request, timeout=self._timeout_s)).ids)
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error) from error

    async def status(self) -> ClusterStatus:
        """Return the cluster as this gateway sees it."""
        request = admin_pb2.GetClusterStatusRequest()
        try:
            return rpc.cluster_status_of(await self._admin.GetClusterStatus(request, timeout=self._timeout_s))
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error) from error

    async def kv_decisions(self, worker_id: str = "", *, last: int = 100) -> list[KvDecision]:
        """Return which compression profiles were chosen for the last KV transfers, newest first per prefill worker.

        Args:
            worker_id: of one prefill worker; empty: of all.
            last: per worker.
        """
        request = admin_pb2.ListClusterKvDecisionsRequest(worker_id=worker_id, last=last)
        try:
            return rpc.kv_decisions_of(await self._admin.ListKvDecisions(request, timeout=self._timeout_s))
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error) from error

    async def explain(self, request_id: str = "", *, last: int = 20) -> list[RouteDecision]:
        """Return why requests were placed where they were, newest first, as far as the gateway still knows.

        Args:
            request_id: of one request; empty: of any. Only the gateway that served it knows, so ask with its address.
            last: at most so many decisions.
        """
        request = admin_pb2.ExplainRequestRequest(request_id=request_id, last=last)
        try:
            return rpc.route_decisions_of(await self._admin.ExplainRequest(request, timeout=self._timeout_s))
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error) from error

    async def _stream(self, request: pb.GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Piece, None]:
        """One attempt."""
        started: pb.Started | None = None
        call = self._inference.Generate(request, timeout=timeout_s)
        try:
            async for response in call:
                match response.WhichOneof("event"):
                    case "started":
                        started = response.started
                    case "delta" if started is not None:
                        delta = response.delta
                        yield Piece(started.request_id, started.seed, delta.text, rpc.tokens_of(delta))
                    case "finished" if started is not None:
                        summary = rpc.summary_of(started, response.finished)
                        yield Piece(started.request_id, started.seed, "", (), summary)
                    case other:
                        raise ServingError(f"the gateway sent {other or 'an empty message'} out of place")
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"no end within {timeout_s} s") from error
            raise rpc.error_of(error) from error
        except asyncio.CancelledError as error:
            if call.cancelled() and not _is_being_cancelled():
                raise Aborted("the call was cancelled") from error
            raise
        finally:
            call.cancel()


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _retry_after_s(error: ServingError) -> float:
    return error.retry_after_s if isinstance(error, RejectedError) else 0.0
