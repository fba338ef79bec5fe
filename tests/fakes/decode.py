"""A decode worker that computes nothing: reserves, waits for the KV, streams; or generates the whole request alone."""

from collections.abc import AsyncIterator
from typing import cast

import grpc

from core.membership import Role
from core.streams import Outbox
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from tests.fakes.worker import FakeWorker


class FakeDecodeWorker(FakeWorker[pb.DecodeReport]):
    """Streams one token at a time, from wherever the prefill worker stopped."""

    role = Role.DECODE

    def _add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_DecodeWorkerServicer_to_server(_Servicer(self), server)

    async def _work(self, submit: pb.PrefillSubmit | pb.DecodeSubmit, outbox: Outbox[pb.DecodeReport]) -> None:
        assert isinstance(submit, pb.DecodeSubmit)
        request, request_id = submit.request, submit.request.request_id
        if submit.generate:
            await self._generate(request, outbox)
            return
        if submit.transfer_id in self.spent:
            self.drop(request_id)
            reused = pb.WorkFailed(request_id=request_id, grpc_code="UNAVAILABLE", reason="not_expected")
            outbox.put(pb.DecodeReport(failed=reused))
            return
        self.spent.add(submit.transfer_id)
        held = self._cached_tokens(request)
        await self.network.landing(submit.transfer_id).wait()
        failure = await self._fail(request_id)
        if failure is not None:
            outbox.put(pb.DecodeReport(failed=failure))
            return
        sent = len(request.prompt_token_ids) - held
        landed = pb.KvLanded(
            request_id=request_id,
            exposed_s=0.003,
            first_decode_s=0.004,
            kv_tokens_held=held,
            kv_tokens_sent=sent,
            kv_bytes=sent * self.network.bytes_per_token,
            kv_profile="none",
            kv_lossless=True,
            kv_wire_bytes=sent * self.network.bytes_per_token + 64,
        )
        outbox.put(pb.DecodeReport(landed=landed))
        async for step in self._steps(request, self.network.reply(request)):
            outbox.put(pb.DecodeReport(outputs=step))
        await self.note()

    async def _generate(self, request: pb.WorkRequest, outbox: Outbox[pb.DecodeReport]) -> None:
        failure = await self._fail(request.request_id)
        if failure is not None:
            outbox.put(pb.DecodeReport(failed=failure))
            return
        reply = self.network.reply(request)
        outputs, measured = self._first_token(request, reply)
        outbox.put(pb.DecodeReport(outputs=outputs))
        outbox.put(pb.DecodeReport(computed=measured))
        await self._keep_prompt(request)
        if len(reply.token_ids) == 1:
            self.drop(request.request_id)
        async for step in self._steps(request, reply):
            outbox.put(pb.DecodeReport(outputs=step))
        await self.note()

    def _welcome(self, welcome: pb.Welcome) -> pb.DecodeReport:
        return pb.DecodeReport(welcome=welcome)

    def _accepted(self, accepted: pb.Accepted) -> pb.DecodeReport:
        return pb.DecodeReport(accepted=accepted)

    def _rejected(self, rejected: pb.Rejected) -> pb.DecodeReport:
        return pb.DecodeReport(rejected=rejected)

    def _load_report(self, load: pb.WorkerLoad) -> pb.DecodeReport:
        return pb.DecodeReport(load=load)


class _Servicer(pb_grpc.DecodeWorkerServicer):
    def __init__(self, worker: FakeDecodeWorker) -> None:
        self._worker = worker

    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.DecodeCommand], context: "pb_grpc._ServicerContext"
    ) -> None:
        first = await anext(request_iterator, None)
        hello = first.hello if first is not None and first.HasField("hello") else None
        await self._worker.serve(
            hello, cast("grpc.aio.ServicerContext[object, pb.DecodeReport]", context), request_iterator
        )

    async def ListCachedBlocks(  # noqa: N802
        self, request: pb.ListCachedBlocksRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListCachedBlocksResponse:
        return await self._worker.list_cached()
