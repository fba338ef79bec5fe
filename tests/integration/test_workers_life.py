"""A worker's life: answers at once, epochs, draining, fencing, the store's outage, load reports, cache snapshots."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from core.errors import ConfigError, RejectReason, WorkerLost
from core.ids import Epoch
from core.membership import (
    Role,
    WorkerIdentity,
    WorkerRecord,
    WorkerState,
    epoch_key,
    kv_event_stream,
    worker_key,
)
from core.rpc import connect
from core.store import STREAM_START
from core.store_memory import MemoryStore
from decode_workers.config import DecodeWorkerConfig
from decode_workers.service import decode_worker
from engine.config import ModelConfig
from engine.engine import Engine
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.service import prefill_worker
from protos import worker_pb2, worker_pb2_grpc
from tests.fake_model import greedy, reference_tokens
from tests.worker_pair import D, P, reason_of, record_of, request, worker_pair
from tests.worker_side import PATIENCE_S, Gate, Side
from tests.worker_stream import EPOCH, decode_stream, prefill_stream
from workers import service


async def test_a_stream_of_another_epoch_is_refused() -> None:
    async with worker_pair() as pair:
        for stream in (prefill_stream(pair.prefill_address, epoch=2), decode_stream(pair.decode_address, epoch=4)):
            async with stream:
                error = await stream.until_over()
                assert error is not None
                assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_stream_that_never_says_hello_is_ended() -> None:
    async with worker_pair(hello_timeout_s=0.2) as pair:
        for address, stub in (
            (pair.prefill_address, worker_pb2_grpc.PrefillWorkerStub),
            (pair.decode_address, worker_pb2_grpc.DecodeWorkerStub),
        ):
            channel = connect(address)
            async with channel, asyncio.timeout(PATIENCE_S):
                call = stub(channel).Connect()
                assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert "hello" in await call.details()
        assert await pair.generate(request("a")) == reference_tokens(request("a"))  # who said hello is served on


async def test_the_first_report_names_the_incarnation_and_the_second_tells_the_load() -> None:
    async with worker_pair(num_blocks=32) as pair:
        for stream, name in ((pair.to_prefill, P), (pair.to_decode, D)):
            await stream.until(lambda report: report.HasField("load"))
            assert stream.reports[0].welcome == worker_pb2.Welcome(worker_id=name, epoch=3)
            assert (stream.reports[1].load.total_blocks, stream.reports[1].load.free_blocks) == (32, 32)


async def test_the_record_says_what_a_gateway_must_know() -> None:
    async with worker_pair(topology={"rack": "r7", "zone": "east"}) as pair:
        for worker_id, role, address in (
            (P, Role.PREFILL, pair.prefill_address),
            (D, Role.DECODE, pair.decode_address),
        ):
            record = await record_of(pair.store, worker_id)
            assert (record.role, record.state, record.address) == (role, WorkerState.READY, address)
            assert (record.block_size, record.weights_version, record.max_model_len) == (4, "fake", 64)
            assert (record.host, record.rack, record.zone) == (socket.gethostname(), "r7", "east")
    assert (await record_of(pair.store, P)).state is WorkerState.STOPPED


async def test_draining_finishes_what_is_there_and_accepts_nothing() -> None:
    asked = request("a", 20, greedy(10))
    async with worker_pair() as pair:
        pair.decode_side.computing.close()
        await pair.submit(asked)
        await pair.decode_side.computing.until_reached()
        drains = [asyncio.create_task(worker.drain(PATIENCE_S)) for worker in (pair.prefill, pair.decode)]
        await asyncio.sleep(0)  # the drains begin
        await pair.submit_decode(request("b"))
        assert reason_of(await pair.to_decode.answer("rejected", "b")) is RejectReason.DRAINING
        await pair.submit_prefill(request("b"))
        assert reason_of(await pair.to_prefill.answer("rejected", "b")) is RejectReason.DRAINING
        assert not drains[1].done()
        pair.decode_side.computing.open()
        await asyncio.gather(*drains)
        await pair.to_decode.until_finished("a")
        assert pair.token_ids("a") == reference_tokens(asked)


async def test_a_drain_past_its_deadline_returns_and_stop_gives_the_rest_up() -> None:
    async with worker_pair() as pair:
        await pair.submit_decode(request("a"))
        await pair.to_decode.answer("accepted", "a")
        await pair.decode.drain(0.01)
        await pair.decode.stop(PATIENCE_S)
        assert (await pair.to_decode.answer("failed", "a")).grpc_code == "UNAVAILABLE"
        await pair.decode.run()


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_newer_epoch_fences_the_worker(side: str) -> None:
    async with worker_pair() as pair:
        worker, worker_id = (pair.prefill, P) if side == "prefill" else (pair.decode, D)
        stream = pair.to_prefill if side == "prefill" else pair.to_decode
        await pair.submit_decode(request("a"))
        await pair.to_decode.answer("accepted", "a")
        for _ in range(4):
            await pair.store.increment(epoch_key("test", worker_id))
        with pytest.raises(WorkerLost, match="fenced by 4"):
            await asyncio.wait_for(worker.run(), PATIENCE_S)
        error = await stream.until_over()
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_both_serve_on_without_the_store_and_are_seen_again_when_it_is_back() -> None:
    store = MemoryStore()
    asked = request("a", 20)
    async with worker_pair(store=store) as pair:
        store.set_available(False)
        assert await pair.generate(asked) == reference_tokens(asked)
        store.set_available(True)
        for worker_id in (P, D):
            await store.delete(worker_key("test", worker_id))
        async with asyncio.timeout(PATIENCE_S):
            streams = {kv_event_stream("test", P): STREAM_START}
            assert await store.read(streams, max_entries=10, wait_s=PATIENCE_S)


class _AttentiveStore(MemoryStore):
    """Tells when a record with this detail was written."""

    def __init__(self, detail: str) -> None:
        super().__init__()
        self._detail = detail
        self.was_written = asyncio.Event()

    async def compare_and_set(
        self, key: str, expected: bytes | None, value: bytes, *, ttl_s: float | None = None
    ) -> bool:
        done = await super().compare_and_set(key, expected, value, ttl_s=ttl_s)
        if done and WorkerRecord.model_validate_json(value).detail == self._detail:
            self.was_written.set()
        return done


async def test_the_record_tells_how_far_the_loading_is_and_a_stop_meanwhile_leaves_nothing() -> None:
    store, side, gate = _AttentiveStore("fake: reading weights (25%)"), Side(64, 8), Gate()
    gate.close()

    def load(config: object, progress: Callable[[str, float], None]) -> Engine:
        progress("reading weights", 0.25)
        gate.pass_through()
        return side.load(config, progress)

    config = PrefillWorkerConfig(model=ModelConfig(path=Path("fake")))
    worker = prefill_worker(config, WorkerIdentity(P, EPOCH, "test"), store, load_engine=load)
    starting = asyncio.create_task(worker.start())
    await asyncio.wait_for(store.was_written.wait(), PATIENCE_S)
    assert (await record_of(store, P)).state is WorkerState.LOADING
    for _ in range(EPOCH + 1):
        await store.increment(epoch_key("test", P))
    with pytest.raises(WorkerLost, match="fenced"):
        await asyncio.wait_for(worker.run(), PATIENCE_S)
    gate.open()
    with pytest.raises(WorkerLost, match="fenced"):
        await starting


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_model_that_is_not_there_is_one_line_and_leaves_nothing(role: str, tmp_path: Path) -> None:
    store, identity = MemoryStore(), WorkerIdentity(P, Epoch(1), "test")
    model = ModelConfig(path=tmp_path / "nowhere")
    worker = (
        prefill_worker(PrefillWorkerConfig(model=model), identity, store)
        if role == "prefill"
        else decode_worker(DecodeWorkerConfig(model=model), identity, store)
    )
    with pytest.raises(ConfigError, match="nowhere"):
        await worker.start()
    assert (await record_of(store, P)).state is WorkerState.STOPPED


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async with worker_pair() as pair:
        port = int(pair.prefill_address.rpartition(":")[2])
        config = PrefillWorkerConfig(model=ModelConfig(path=tmp_path), port=port)
        worker = prefill_worker(
            config, WorkerIdentity(P, Epoch(4), "other"), MemoryStore(), load_engine=pair.prefill_side.load
        )
        engine = pair.prefill_side.engine
        with pytest.raises(ConfigError, match=str(port)):
            await worker.start()
        pair.prefill_side.engine = engine


async def test_a_kv_service_that_does_not_close_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hangs(close: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        async def close_and_hang() -> None:
            await close()
            await asyncio.Event().wait()

        return close_and_hang

    async with worker_pair() as pair:
        monkeypatch.setattr(service, "_CLOSE_S", 0.2)
        for worker in (pair.prefill, pair.decode):
            assert worker._parts is not None
            desk = worker._parts.desk
            monkeypatch.setattr(desk, "end", hangs(desk.end))
            async with asyncio.timeout(PATIENCE_S):
                await worker.stop(PATIENCE_S)
                await worker.run()
        assert caplog.text.count("does not close") == 2
