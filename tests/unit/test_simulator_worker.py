"""A simulated worker alone: what it answers, when KV is where, and that everything is given back."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from core.errors import RejectReason
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.membership import LoadReport, Role, WorkerRecord, WorkerState
from core.request import GenerateRequest, SamplingParams
from router import messages as m
from router.forwarding.worker_port import DecodeOrder, PrefillOrder
from simulator.answers import WorkerTerms
from simulator.latency import DecodeLatency, LinkLatency, PrefillLatency, StepLatency
from simulator.machines import Machine
from simulator.virtual_time import run_virtual, virtual_loop
from simulator.wire import Wire
from simulator.worker import Say, SimulatedWorker

_BLOCK = 16
_KV_BYTES = 1000
_MACHINE = Machine(
    "test",
    prefill=PrefillLatency(0.01, 1e-3, 0.0),
    decode=DecodeLatency(StepLatency(0.01, 0.0, 0.0)),
    link=LinkLatency(0.001, 1e6, num_layers=4),
    kv_bytes_per_token=_KV_BYTES,
    kv_tokens=100 * _BLOCK,
    chunk_tokens=64,
)
_WORK = TransferId("r/0.x")


@dataclass
class Pair:
    """A prefill and a decode worker, and all that they said, with the time."""

    prefill: SimulatedWorker
    decode: SimulatedWorker
    say: Wire[Say]
    said: list[tuple[float, m.Event]] = field(default_factory=list)
    loads: list[LoadReport] = field(default_factory=list)

    def at(self, kind: type[m.Event]) -> float:
        return next(now for now, event in self.said if isinstance(event, kind))

    def the(self, kind: type[m.Event]) -> Any:
        (found,) = (event for _, event in self.said if isinstance(event, kind))
        return found

    def check_free(self) -> None:
        for worker in (self.prefill, self.decode):
            assert worker.num_held == worker.engine.num_running == worker.engine.num_prompts == 0
            assert worker.pool.free_blocks == worker.pool.total_blocks
            worker.pool.check()


def _run(
    test: Callable[[Pair], Coroutine[Any, Any, None]], terms: WorkerTerms | None = None, outputs: int = 11
) -> None:
    async def main() -> None:
        loop = virtual_loop()
        workers = {}
        for role in Role:
            record = WorkerRecord(
                worker_id=WorkerId(role), role=role, epoch=Epoch(1), state=WorkerState.READY, block_size=_BLOCK,
                max_model_len=4096, kv_bytes_per_token=_KV_BYTES,
            )  # fmt: skip
            workers[record.worker_id] = SimulatedWorker(
                loop, record, _MACHINE, terms or WorkerTerms(), output_tokens=lambda name: outputs,
                on_gaps=lambda name, gaps: None, on_cache=lambda batch: None,
            )  # fmt: skip
        pair = Pair(workers[WorkerId("prefill")], workers[WorkerId("decode")], Wire(loop, 0.0, lambda what: hear(what)))

        def hear(what: Say) -> None:
            if isinstance(what, LoadReport):
                pair.loads.append(what)
            else:
                pair.said.extend((loop.now(), event) for _, event in what)

        for worker in workers.values():
            worker.connect(Wire(loop, 0.0, hear), workers)
        await test(pair)
        await asyncio.sleep(100)
        pair.check_free()

    run_virtual(main())


def _request(num_tokens: int, name: str = "r") -> GenerateRequest:
    return GenerateRequest(RequestId(name), (0,) * num_tokens, SamplingParams(max_tokens=100))


def _hashes(num_tokens: int) -> tuple[bytes, ...]:
    return tuple(f"block {number}".encode() for number in range(num_tokens // _BLOCK))


def test_kv_goes_while_the_prompt_computes_and_only_what_is_missing() -> None:
    async def test(pair: Pair) -> None:
        request = _request(128)
        pair.decode.submit_decode(DecodeOrder(_WORK, request, _hashes(128)), pair.say)
        pair.prefill.submit_prefill(PrefillOrder(_WORK, request, _hashes(128), pair.decode.record), pair.say)
        await asyncio.sleep(50)
        first_at = pair.at(m.PrefillProduced)
        assert first_at == pytest.approx(2 * 0.01 + 0.128)
        # 64 tokens a chunk: 0.064 s on the wire in the 0.074 s that it takes; the last layer follows the end.
        landed = pair.the(m.KvLanded)
        assert landed.exposed_s == pytest.approx(0.064 / 4 + 0.001, rel=0.01)
        assert (landed.kv_tokens_sent, landed.kv_bytes) == (128, 128 * _KV_BYTES)
        assert pair.at(m.DecodeFinished) == pytest.approx(first_at + landed.exposed_s + 10 * 0.01)
        assert len(pair.the(m.DecodeFinished).tokens) == 10
        pair.said.clear()
        again = TransferId("r/1.x")  # both hold seven or eight blocks now
        pair.decode.submit_decode(DecodeOrder(again, request, _hashes(128)), pair.say)
        pair.prefill.submit_prefill(PrefillOrder(again, request, _hashes(128), pair.decode.record), pair.say)
        await asyncio.sleep(50)
        assert pair.the(m.PrefillMeasured).cached_tokens == 127
        assert pair.the(m.KvLanded).kv_tokens_sent == 1

    _run(test)


@pytest.mark.parametrize("bound_after_s", [0.05, 1.0])
def test_a_prompt_may_be_bound_while_it_computes_or_after(bound_after_s: float) -> None:
    async def test(pair: Pair) -> None:
        request = _request(128)
        pair.prefill.submit_prefill(PrefillOrder(_WORK, request, _hashes(128), bind_later=True), pair.say)
        await asyncio.sleep(bound_after_s)
        pair.decode.submit_decode(DecodeOrder(_WORK, request, _hashes(128)), pair.say)
        pair.prefill.bind(_WORK, WorkerId("decode"))
        await asyncio.sleep(50)
        first_at = pair.at(m.PrefillProduced)
        assert first_at == pytest.approx(0.148)
        least_at = max(first_at, bound_after_s)
        assert least_at < pair.at(m.KvLanded) <= least_at + 0.128 + 0.002
        assert len(pair.the(m.DecodeFinished).tokens) == 10

    _run(test)


@pytest.mark.parametrize("bound_after_s", [0.05, 1.0])
def test_a_prompt_that_nobody_takes_over_is_decoded_where_it_is(bound_after_s: float) -> None:
    async def test(pair: Pair) -> None:
        pair.prefill.submit_prefill(PrefillOrder(_WORK, _request(128), _hashes(128), bind_later=True), pair.say)
        await asyncio.sleep(bound_after_s)
        pair.prefill.bind(_WORK, None)
        await asyncio.sleep(50)
        assert pair.at(m.PrefillFinished) == pytest.approx(max(0.148, bound_after_s) + 10 * 0.01)
        assert not any(isinstance(event, m.KvHandedOver | m.KvLanded) for _, event in pair.said)

    _run(test)


def test_one_worker_may_do_all() -> None:
    async def test(pair: Pair) -> None:
        pair.decode.submit_decode(DecodeOrder(_WORK, _request(60), (), generate=True), pair.say)
        await asyncio.sleep(50)
        assert pair.at(m.DecodeProduced) == pytest.approx(0.07)
        assert pair.at(m.DecodeFinished) == pytest.approx(0.17)

    _run(test)


def test_the_first_token_may_be_the_last() -> None:
    async def test(pair: Pair) -> None:
        pair.prefill.submit_prefill(PrefillOrder(_WORK, _request(60), ()), pair.say)
        await asyncio.sleep(50)
        assert len(pair.the(m.PrefillFinished).tokens) == 1

    _run(test, outputs=1)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.16, 0.2])
def test_an_abort_frees_everything_at_any_time(after_s: float) -> None:
    async def test(pair: Pair) -> None:
        request = _request(128)
        pair.decode.submit_decode(DecodeOrder(_WORK, request, _hashes(128)), pair.say)
        pair.prefill.submit_prefill(PrefillOrder(_WORK, request, _hashes(128), pair.decode.record), pair.say)
        await asyncio.sleep(after_s)
        pair.prefill.abort(_WORK)
        pair.decode.abort(_WORK)
        await asyncio.sleep(50)
        assert not any(isinstance(event, m.DecodeFinished) for _, event in pair.said)

    _run(test)


@pytest.mark.parametrize("honours_bounds", [True, False])
def test_a_conditional_order_is_refused_by_whoever_is_busier(honours_bounds: bool) -> None:
    async def test(pair: Pair) -> None:
        pair.prefill.submit_prefill(PrefillOrder(TransferId("r/0"), _request(500), ()), pair.say)
        order = PrefillOrder(TransferId("r/1"), _request(20), (), max_queued_tokens=400)
        pair.prefill.submit_prefill(order, pair.say)
        await asyncio.sleep(0.001)
        refused = [event for _, event in pair.said if isinstance(event, m.PrefillRejected)]
        if honours_bounds:
            assert refused[0].error.reason is RejectReason.BUSIER
            assert refused[0].load is not None
            assert refused[0].load.queued_prefill_tokens == 500
        else:
            assert not refused

    _run(test, WorkerTerms(honours_bounds=honours_bounds))


def test_without_room_it_says_so() -> None:
    async def test(pair: Pair) -> None:
        for number in range(2):
            pair.decode.submit_decode(DecodeOrder(TransferId(f"r/{number}"), _request(1000), ()), pair.say)
        await asyncio.sleep(0.001)
        assert pair.the(m.DecodeRejected).error.reason is RejectReason.NO_BLOCKS
        pair.decode.abort(TransferId("r/0"))

    _run(test)


def test_periodic_reports_come_by_themselves_only() -> None:
    async def test(pair: Pair) -> None:
        pair.prefill.start(0.5)
        pair.prefill.submit_prefill(PrefillOrder(_WORK, _request(128), ()), pair.say)
        await asyncio.sleep(5.5)
        assert pair.the(m.PrefillAccepted).load is None
        assert len(pair.loads) == 3  # at 1, 3 and 5 s

    _run(test, WorkerTerms(reports_changes=False, heartbeat_s=2.0))
