"""A real prefill worker and a real decode worker in one process, and a gateway that does what a test tells it.

Engines run over `tests.fake_model` unless a test loads a model, so a wrong KV byte is a wrong token; gRPC is real, KV
crosses a memory link. A runner's gate holds a forward pass, an engine's gate holds the copying of KV: so a test can act
while a request is in any state, without sleeping.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from core.errors import RejectReason
from core.ids import RequestId, WorkerId
from core.membership import WorkerIdentity, WorkerRecord, worker_key
from core.registration import RegistrationConfig
from core.request import GenerateRequest, SamplingParams
from core.store import Store
from core.store_memory import MemoryStore
from decode_workers.config import DecodeWorkerConfig
from decode_workers.service import decode_worker
from engine.config import EngineConfig, ModelConfig
from kv_transfer.config import KvTransferConfig
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.service import prefill_worker
from protos import codec, worker_pb2
from tests.fake_model import greedy
from tests.worker_side import PATIENCE_S, Side, check_empty
from tests.worker_stream import EPOCH, WorkerStream, decode_stream, prefill_stream
from workers.config import WorkerConfig
from workers.service import Worker

P, D = WorkerId("p0"), WorkerId("d0")


@dataclass
class Pair:
    """Both workers, running, and this test's streams to them."""

    store: Store
    prefill: Worker
    decode: Worker
    prefill_side: Side
    decode_side: Side
    prefill_address: str
    decode_address: str
    to_prefill: WorkerStream
    to_decode: WorkerStream
    num_probes: int = 0

    async def submit_decode(
        self, request: GenerateRequest, *, attempt: int = 0, lease_s: float = 20.0, **terms: Any
    ) -> None:
        """`terms`: other fields of the message."""
        submit = worker_pb2.DecodeSubmit(
            request=codec.request_to_wire(request),
            transfer_id=f"{request.request_id}/{attempt}",
            lease_s=lease_s,
            **terms,
        )
        await self.to_decode.send(submit=submit)

    async def submit_prefill(
        self,
        request: GenerateRequest,
        *,
        attempt: int = 0,
        hand_off: bool = True,
        bind_later: bool = False,
        **terms: Any,
    ) -> None:
        """`terms`: other fields of the message."""
        submit = worker_pb2.PrefillSubmit(request=codec.request_to_wire(request), bind_later=bind_later, **terms)
        submit.kv_quality_floor = request.kv_quality_floor
        if hand_off or bind_later:
            submit.transfer_id = f"{request.request_id}/{attempt}"
        if hand_off and not bind_later:
            submit.decode_worker_id, submit.decode_epoch = D, EPOCH
            submit.decode_address = self.decode_address
        await self.to_prefill.send(submit=submit)

    async def bind(self, request: GenerateRequest) -> None:
        """Have the decode worker accept, then name it to the prefill worker."""
        await self.submit_decode(request)
        await self.to_decode.answer("accepted", request.request_id)
        await self.say_bind(request)

    async def say_bind(self, request: GenerateRequest) -> None:
        """Name the decode worker, which has accepted, to the prefill worker."""
        bind = worker_pb2.PrefillBind(
            request_id=request.request_id,
            decode_worker_id=D,
            decode_epoch=EPOCH,
            decode_address=self.decode_address,
        )
        await self.to_prefill.send(bind=bind)

    async def keep(self, request_id: str) -> None:
        """Have the prefill worker generate the request itself."""
        await self.to_prefill.send(bind=worker_pb2.PrefillBind(request_id=request_id))

    async def abort_prefill(self, request_id: str) -> None:
        """Return when the worker has taken the abort."""
        await self.to_prefill.abort(request_id)
        await self.until_prefill_heard()

    async def until_prefill_heard(self) -> None:
        """Return when the worker has taken what was sent: a stream's commands are taken in order, a probe is one."""
        self.num_probes += 1
        probe = request(f"probe{self.num_probes}", 1000)
        await self.submit_prefill(probe, hand_off=False)
        await self.to_prefill.answer("rejected", probe.request_id)

    async def abort_decode(self, request_id: str) -> None:
        """As `abort_prefill`."""
        await self.to_decode.abort(request_id)
        self.num_probes += 1
        probe = request(f"probe{self.num_probes}", 1000)
        await self.submit_decode(probe)
        await self.to_decode.answer("rejected", probe.request_id)

    async def submit(self, request: GenerateRequest) -> None:
        """To both, as a gateway does."""
        await self.submit_decode(request)
        await self.to_decode.answer("accepted", request.request_id)
        await self.submit_prefill(request)
        await self.to_prefill.answer("accepted", request.request_id)

    async def generate(self, request: GenerateRequest) -> list[int]:
        """Return the tokens of a whole request, whose indices must be contiguous across both workers."""
        await self.submit(request)
        await self.to_prefill.until_output(request.request_id)
        if self.to_prefill.outputs(request.request_id)[-1].finish is not None:
            await self.to_decode.abort(request.request_id)
        else:
            await self.to_decode.until_finished(request.request_id)
            await self.to_prefill.answer("handed_over", request.request_id)
        return self.token_ids(request.request_id)

    def token_ids(self, request_id: str) -> list[int]:
        outputs = self.to_prefill.outputs(request_id) + self.to_decode.outputs(request_id)
        tokens = [token for output in outputs for token in output.tokens]
        assert [token.index for token in tokens] == list(range(len(tokens)))
        return [token.token_id for token in tokens]

    async def prefill_is_empty(self) -> None:
        """Return when the worker holds no request; then every block must be free or cached."""
        async with asyncio.timeout(PATIENCE_S):
            parts = self.prefill._parts
            assert parts is not None
            await parts.desk.requests.until_empty()
            await asyncio.wrap_future(parts.engine.call(check_empty))

    async def decode_is_empty(self) -> None:
        """As `prefill_is_empty`."""
        async with asyncio.timeout(PATIENCE_S):
            parts = self.decode._parts
            assert parts is not None
            await parts.desk.requests.until_empty()
            await asyncio.wrap_future(parts.engine.call(check_empty))

    async def until_idle(self) -> None:
        await self.prefill_is_empty()
        await self.decode_is_empty()


def request(name: str, prompt: int | tuple[int, ...] = 10, sampling: SamplingParams | None = None) -> GenerateRequest:
    """Return a request; an integer prompt is a length."""
    token_ids = tuple((7 * at + len(name)) % 90 for at in range(prompt)) if isinstance(prompt, int) else prompt
    return GenerateRequest(RequestId(name), token_ids, sampling or greedy(6))


@contextlib.asynccontextmanager
async def worker_pair(
    *,
    num_blocks: int = 64,
    max_batch_tokens: int = 8,
    max_queued_tokens: int = 1000,
    max_decode_requests: int = 64,
    metrics_port: int | None = None,
    hello_timeout_s: float = 10.0,
    backend: Any = "memory",
    store: Store | None = None,
    model: ModelConfig | None = None,
    engine: EngineConfig | None = None,
    transfer: Mapping[str, object] = MappingProxyType({}),
    replaced: Mapping[str, str] = MappingProxyType({}),
    **settings: Any,
) -> AsyncIterator[Pair]:
    """Start both; stop both; then every block of both must be free or cached.

    Args:
        model: a checkpoint to load in place of the fake.
        transfer: settings of KV transfer that differ from the test's usual ones.
        settings: of those workers that have them.
        replaced: `prefill_address` or `decode_address`, of a worker elsewhere that takes the place of ours.
    """
    store = store or MemoryStore()
    sides = Side(num_blocks, max_batch_tokens), Side(num_blocks, max_batch_tokens)
    shared: dict[str, Any] = {
        "model": model or ModelConfig(path=Path("fake")),
        "engine": engine or EngineConfig(),
        "transfer": KvTransferConfig.model_validate(
            {"backend": backend, "slot_bytes": 4096, "credit_bytes": 65536, "lease_s": 15.0, **transfer}
        ),
        "registration": RegistrationConfig(lease_s=0.6),
        "load_interval_s": 0.001,
        "metrics_port": metrics_port,
        "hello_timeout_s": hello_timeout_s,
        **settings,
    }
    loaders: tuple[Any, Any] = (None, None) if model else (sides[0].load, sides[1].load)
    prefill = prefill_worker(
        PrefillWorkerConfig(**_known(PrefillWorkerConfig, shared), max_queued_tokens=max_queued_tokens),
        WorkerIdentity(P, EPOCH, "test"),
        store,
        load_engine=loaders[0],
    )
    decode = decode_worker(
        DecodeWorkerConfig(**_known(DecodeWorkerConfig, shared), max_requests=max_decode_requests),
        WorkerIdentity(D, EPOCH, "test"),
        store,
        load_engine=loaders[1],
    )
    try:
        own = await prefill.start(), await decode.start()
        addresses = replaced.get("prefill_address", own[0]), replaced.get("decode_address", own[1])
        async with prefill_stream(addresses[0]) as to_prefill, decode_stream(addresses[1]) as to_decode:
            yield Pair(store, prefill, decode, *sides, *addresses, to_prefill, to_decode)
    finally:
        for side in sides:
            side.computing.open()
            side.copying.open()
        await prefill.stop(PATIENCE_S)
        await decode.stop(PATIENCE_S)
    if model is None:
        for side in sides:
            assert side.engine is not None
            check_empty(side.engine)


def _known(config: type[WorkerConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in config.model_fields}


def reason_of(rejected: worker_pb2.Rejected) -> RejectReason:
    return RejectReason(rejected.reason)


async def record_of(store: Store, worker_id: str) -> WorkerRecord:
    value = await store.get(worker_key("test", worker_id))  # type: ignore[arg-type]
    assert value is not None
    return WorkerRecord.model_validate_json(value)
