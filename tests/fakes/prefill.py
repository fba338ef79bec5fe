"""A prefill worker that computes nothing: first token, hand-over, late binding, or the whole request alone."""

from collections.abc import AsyncIterator, Sequence
from typing import cast

import grpc

from core.membership import Role
from core.streams import Outbox
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from tests.fakes.worker import FakeWorker


class FakePrefillWorker(FakeWorker[pb.PrefillReport]):
    """Accepts, "computes", streams the first token, hands over; generates all of it when there is nobody to hand to."""

    role = Role.PREFILL
    hands_over = True
    """False: the KV never leaves."""
    kv_decisions: Sequence[pb.KvDecision] = ()
    """What it answers when it is asked for them."""

    def _add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_PrefillWorkerServicer_to_server(_Servicer(self), server)

    async def _work(self, submit: pb.PrefillSubmit | pb.DecodeSubmit, outbox: Outbox[pb.PrefillReport]) -> None:
        assert isinstance(submit, pb.PrefillSubmit)
        request, request_id = submit.request, submit.request.request_id
        failure = await self._fail(request_id)
        if failure is not None:
            outbox.put(pb.PrefillReport(failed=failure))
            return
        reply = self.network.reply(request)
        outputs, measured = self._first_token(request, reply)
        outbox.put(pb.PrefillReport(outputs=outputs))
        outbox.put(pb.PrefillReport(computed=measured))
        await self._keep_prompt(request)
        if len(reply.token_ids) == 1:
            self.drop(request_id)
        elif await self._is_alone(submit):
            async for step in self._steps(request, reply):
                outbox.put(pb.PrefillReport(outputs=step))
        else:
            self.drop(request_id)
            if self.hands_over:
                self.network.landing(submit.transfer_id).set()
                handed_over = pb.HandedOver(request_id=request_id, link_goodput_bytes_per_s=1e9, link_rtt_s=1e-4)
                outbox.put(pb.PrefillReport(handed_over=handed_over))
        await self.note()

    async def _is_alone(self, submit: pb.PrefillSubmit) -> bool:
        """Learn, if need be, whether a decode worker goes on."""
        if not submit.transfer_id:
            return True
        if not submit.bind_later:
            return False
        request_id = submit.request.request_id
        async with self._changed:
            await self._changed.wait_for(lambda: any(bind.request_id == request_id for bind in self.binds))
        bind = next(bind for bind in self.binds if bind.request_id == request_id)
        return not bind.decode_worker_id

    def _welcome(self, welcome: pb.Welcome) -> pb.PrefillReport:
        return pb.PrefillReport(welcome=welcome)

    def _accepted(self, accepted: pb.Accepted) -> pb.PrefillReport:
        return pb.PrefillReport(accepted=accepted)

    def _rejected(self, rejected: pb.Rejected) -> pb.PrefillReport:
        return pb.PrefillReport(rejected=rejected)

    def _load_report(self, load: pb.WorkerLoad) -> pb.PrefillReport:
        return pb.PrefillReport(load=load)


class _Servicer(pb_grpc.PrefillWorkerServicer):
    def __init__(self, worker: FakePrefillWorker) -> None:
        self._worker = worker

    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PrefillCommand], context: "pb_grpc._ServicerContext"
    ) -> None:
        first = await anext(request_iterator, None)
        hello = first.hello if first is not None and first.HasField("hello") else None
        await self._worker.serve(
            hello, cast("grpc.aio.ServicerContext[object, pb.PrefillReport]", context), request_iterator
        )

    async def ListCachedBlocks(  # noqa: N802
        self, request: pb.ListCachedBlocksRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListCachedBlocksResponse:
        return await self._worker.list_cached()

    async def ListKvDecisions(  # noqa: N802
        self, request: pb.ListKvDecisionsRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListKvDecisionsResponse:
        worker = self._worker
        decisions = worker.kv_decisions[: request.last or None]
        return pb.ListKvDecisionsResponse(worker_id=worker.worker_id, epoch=worker.epoch, decisions=decisions)
