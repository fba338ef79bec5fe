"""The two roles of a paced worker: prompts one after the other, and decoding in batches of whoever is there."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from benchmarks.paced_worker import Floor, Pace, PacedWorker, Submit, Work
from core.errors import RejectReason
from core.ids import RequestId
from core.membership import Role
from core.request import Finish, FinishReason, RequestOutput, TokenOutput
from core.store import Store
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from protos.codec import outputs_to_wire

_FIRST_TOKEN = 100


def _output(work: Work, index: int) -> pb.OutputBatch:
    last = work.request.sampling.max_tokens - 1
    token = TokenOutput(index, _FIRST_TOKEN + index % 1000)
    finish = Finish(FinishReason.LENGTH) if index == last else None
    return outputs_to_wire([RequestOutput(RequestId(work.work_id), (token,), finish)])


def _is_one_token(work: Work) -> bool:
    return work.request.sampling.max_tokens == 1


class PacedPrefill(PacedWorker):
    """Computes one prompt at a time, in order of arrival."""

    role = Role.PREFILL

    def __init__(self, name: str, floor: Floor, store: Store, cluster: str, pace: Pace) -> None:
        super().__init__(name, floor, store, cluster, pace)
        self._turn = asyncio.Lock()
        floor.prefills.append(self)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens accepted and not computed."""
        return sum(work.uncached_tokens for work in self.works.values())

    def _refusal(self, submit: Submit) -> RejectReason | None:
        if self.queued_tokens > self._pace.max_queued_tokens:
            return RejectReason.QUEUE_FULL
        if submit.HasField("max_queued_tokens") and self.queued_tokens > submit.max_queued_tokens:
            return RejectReason.BUSIER
        return None

    async def _work(self, work: Work) -> None:
        assert isinstance(work.submit, pb.PrefillSubmit)
        request, outbox, pace = work.request, work.outbox, self._pace
        loop = asyncio.get_running_loop()
        queued_at = loop.time()
        async with self._turn:
            started_at = loop.time()
            work.uncached_tokens = self.uncached(request)  # of what came before it in the queue, too
            cached = len(request.prompt_token_ids) - work.uncached_tokens
            await asyncio.sleep(pace.prefill_base_s + pace.prefill_s_per_token * work.uncached_tokens)
            work.uncached_tokens = 0
            self.remember(tuple(request.block_hashes))
        outbox.put(pb.PrefillReport(outputs=_output(work, 0)))
        computed = pb.PrefillComputed(
            request_id=work.work_id,
            queue_s=started_at - queued_at,
            compute_s=loop.time() - started_at,
            cached_tokens=cached,
        )
        outbox.put(pb.PrefillReport(computed=computed))
        if _is_one_token(work):
            return
        if work.submit.bind_later:
            await work.bound.wait()
        if work.generates or not work.submit.transfer_id:
            for index in range(1, request.sampling.max_tokens):
                await asyncio.sleep(pace.step_base_s)
                outbox.put(pb.PrefillReport(outputs=_output(work, index)))
            return
        await asyncio.sleep(pace.transfer_s)
        self._floor.landing(work.submit.transfer_id).set()
        outbox.put(pb.PrefillReport(handed_over=pb.HandedOver(request_id=work.work_id)))

    def _facts(self) -> dict[str, int | float]:
        return {
            "num_running": min(1, len(self.works)),
            "num_waiting": max(0, len(self.works) - 1),
            "queued_prefill_tokens": self.queued_tokens,
            "free_blocks": 10_000,
            "total_blocks": 10_000,
            "cached_blocks": len(self._cache),
            "prefill_tokens_per_s": 1.0 / self._pace.prefill_s_per_token,
        }

    def _wrap(
        self,
        *,
        welcome: pb.Welcome | None = None,
        accepted: pb.Accepted | None = None,
        rejected: pb.Rejected | None = None,
        load: pb.WorkerLoad | None = None,
    ) -> pb.PrefillReport:
        return pb.PrefillReport(welcome=welcome, accepted=accepted, rejected=rejected, load=load)

    def _add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_PrefillWorkerServicer_to_server(_PrefillServicer(self), server)


class PacedDecode(PacedWorker):
    """One step after the other for all that have landed."""

    role = Role.DECODE

    def __init__(self, name: str, floor: Floor, store: Store, cluster: str, pace: Pace) -> None:
        super().__init__(name, floor, store, cluster, pace)
        self._batch: set[Work] = set()

    def _refusal(self, submit: Submit) -> RejectReason | None:
        assert isinstance(submit, pb.DecodeSubmit)
        if len(self.works) >= self._pace.max_requests:
            return RejectReason.QUEUE_FULL
        if submit.HasField("max_requests_held") and len(self.works) > submit.max_requests_held:
            return RejectReason.BUSIER
        return None

    async def _work(self, work: Work) -> None:
        assert isinstance(work.submit, pb.DecodeSubmit)
        request, outbox, loop = work.request, work.outbox, asyncio.get_running_loop()
        started_at = loop.time()
        if work.submit.generate:
            await asyncio.sleep(self._pace.prefill_base_s + self._pace.prefill_s_per_token * work.uncached_tokens)
            self.remember(tuple(request.block_hashes))
            outbox.put(pb.DecodeReport(outputs=_output(work, 0)))
            cached = len(request.prompt_token_ids) - work.uncached_tokens
            outbox.put(
                pb.DecodeReport(
                    computed=pb.PrefillComputed(
                        request_id=work.work_id, compute_s=loop.time() - started_at, cached_tokens=cached
                    )
                )
            )
        else:
            await self._landed(work)
        work.uncached_tokens = 0
        self._batch.add(work)
        try:
            for index in range(1, request.sampling.max_tokens):
                await asyncio.sleep(self._pace.step_base_s + self._pace.step_s_per_request * len(self._batch))
                outbox.put(pb.DecodeReport(outputs=_output(work, index)))
        finally:
            self._batch.discard(work)

    async def _landed(self, work: Work) -> None:
        assert isinstance(work.submit, pb.DecodeSubmit)
        transfer_id = work.submit.transfer_id
        try:
            await self._floor.landing(transfer_id).wait()
        finally:
            self._floor.landings.pop(transfer_id, None)
        num_tokens = len(work.request.prompt_token_ids)
        self.remember(tuple(work.request.block_hashes))
        landed = pb.KvLanded(
            request_id=work.work_id,
            exposed_s=self._pace.transfer_s,
            first_decode_s=self._pace.step_base_s,
            kv_tokens_sent=num_tokens,
            kv_bytes=1024 * num_tokens,
            kv_profile="none",
            kv_lossless=True,
            kv_wire_bytes=1024 * num_tokens,
        )
        work.outbox.put(pb.DecodeReport(landed=landed))

    def _facts(self) -> dict[str, int | float]:
        reserved = len(self.works) - len(self._batch)
        return {
            "num_running": len(self._batch),
            "num_waiting": reserved,
            "num_reserved": reserved,
            "reserved_tokens": sum(
                len(work.request.prompt_token_ids) for work in self.works.values() if work not in self._batch
            ),
            "context_tokens": sum(len(work.request.prompt_token_ids) for work in self._batch),
            "free_blocks": 10_000,
            "total_blocks": 10_000,
            "decode_step_s": self._pace.step_base_s + self._pace.step_s_per_request * len(self._batch),
        }

    def _wrap(
        self,
        *,
        welcome: pb.Welcome | None = None,
        accepted: pb.Accepted | None = None,
        rejected: pb.Rejected | None = None,
        load: pb.WorkerLoad | None = None,
    ) -> pb.DecodeReport:
        return pb.DecodeReport(welcome=welcome, accepted=accepted, rejected=rejected, load=load)

    def _add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_DecodeWorkerServicer_to_server(_DecodeServicer(self), server)


class _PrefillServicer(pb_grpc.PrefillWorkerServicer):
    def __init__(self, worker: PacedPrefill) -> None:
        self._worker = worker

    async def Connect(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PrefillCommand], context: "pb_grpc._ServicerContext"
    ) -> AsyncIterator[pb.PrefillReport]:
        async for report in self._worker.serve(request_iterator):
            assert isinstance(report, pb.PrefillReport)
            yield report

    async def ListCachedBlocks(  # noqa: N802
        self, request: pb.ListCachedBlocksRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListCachedBlocksResponse:
        return await self._worker.list_cached()

    async def ListKvDecisions(  # noqa: N802
        self, request: pb.ListKvDecisionsRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListKvDecisionsResponse:
        return pb.ListKvDecisionsResponse(worker_id=self._worker.worker_id)


class _DecodeServicer(pb_grpc.DecodeWorkerServicer):
    def __init__(self, worker: PacedDecode) -> None:
        self._worker = worker

    async def Connect(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.DecodeCommand], context: "pb_grpc._ServicerContext"
    ) -> AsyncIterator[pb.DecodeReport]:
        async for report in self._worker.serve(request_iterator):
            assert isinstance(report, pb.DecodeReport)
            yield report

    async def ListCachedBlocks(  # noqa: N802
        self, request: pb.ListCachedBlocksRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListCachedBlocksResponse:
        return await self._worker.list_cached()
