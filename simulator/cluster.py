"""A whole cluster in virtual time: builds workers and gateways, plays traffic, collects what became of it."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import RejectedError, ServingError
from core.ids import Epoch, GatewayId, RequestId, WorkerId
from core.kv_events import KvEventBatch
from core.membership import Role, WorkerRecord, WorkerState
from core.request import GenerateRequest, SamplingParams
from core.store_memory import MemoryStore
from router.admission.config import AdmissionConfig, ClassConfig, DoorMode
from router.config import RouterConfig
from router.prompt_hashes import HashKey, PromptHashes
from router.reading_turns import Bell, ReadingTurns
from router.routing.config import RoutingConfig
from router.service_terms import ServiceWish, service_terms
from router.stream import Completion
from simulator.answers import WorkerTerms
from simulator.engine import Gaps
from simulator.gateway import SimulatedGateway
from simulator.machines import MACHINES, Machine
from simulator.outcomes import LoadSample, Outcome, Run, SimulatedRequest
from simulator.traces import MOONCAKE_BLOCK_TOKENS
from simulator.virtual_time import VirtualLoop, run_virtual, virtual_loop
from simulator.worker import MAX_OUTPUT_TOKENS, SimulatedWorker

_WEIGHTS = "simulated"
_EPOCH = Epoch(1)
_TERMS = WorkerTerms()


_OFF = ClassConfig(door=DoorMode.OFF)
OPEN_DOOR = AdmissionConfig(interactive=_OFF, deadline=_OFF, batch=_OFF)
"""Nobody is refused for what is predicted: to compare how requests are placed."""


def router_config(routing: RoutingConfig | None = None, **changes: object) -> RouterConfig:
    """Return a gateway's configuration for simulation: nothing is read from its model's path."""
    fields = {"max_unread_tokens": MAX_OUTPUT_TOKENS, "request_timeout_s": 120.0, **changes}
    return RouterConfig(model_path=Path(), routing=routing or RoutingConfig(), **fields)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated, but for the traffic.

    Attributes:
        num_racks: over which the workers of either role are spread evenly.
        shares_news: several gateways tell each other what they sent where, through a store.
        store_outage_s: from when to when that store is gone.
        wire_delay_s: one way between gateway and worker.
        kv_event_delay_s: from a change of a worker's cache to a gateway's index.
        max_model_len: longest prompt and output together.
    """

    config: RouterConfig
    num_prefill: int = 8
    num_decode: int = 8
    machine: Machine = MACHINES["llama70b-a800x8"]
    terms: WorkerTerms = _TERMS
    num_racks: int = 1
    num_gateways: int = 1
    shares_news: bool = True
    store_outage_s: tuple[float, float] | None = None
    wire_delay_s: float = 0.0005
    kv_event_delay_s: float = 0.05
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    max_model_len: int = 200_000
    sample_interval_s: float = 1.0


def simulate(scenario: Scenario, traffic: Sequence[SimulatedRequest], *, seed: int) -> Run:
    """Play `traffic` to its last token. Equal arguments give equal runs."""
    return run_virtual(_Cluster(scenario, traffic, seed).run())


class _Cluster:
    """One run."""

    def __init__(self, scenario: Scenario, traffic: Sequence[SimulatedRequest], seed: int) -> None:
        self._scenario = scenario
        self._traffic = sorted(traffic, key=lambda request: request.arrival_s)
        self._rng = random.Random(seed)
        self._outputs = {request.request_id: request.output_tokens for request in traffic}
        self._gaps: dict[str, Gaps] = {}
        self._outcomes: list[Outcome] = []
        self._samples: list[LoadSample] = []
        self._gateways: list[SimulatedGateway] = []
        self._workers: dict[WorkerId, SimulatedWorker] = {}
        longest = max((request.prompt_tokens for request in traffic), default=1)
        self._prompt = (0,) * longest  # the router reads its length only
        self._turns = ReadingTurns()

    async def run(self) -> Run:
        loop = virtual_loop()
        scenario = self._scenario
        self._workers = {worker.worker_id: worker for worker in self._make_workers(loop)}
        store = MemoryStore(loop) if scenario.shares_news and scenario.num_gateways > 1 else None
        if store is not None and scenario.store_outage_s is not None:
            gone_at, back_at = scenario.store_outage_s
            loop.call_at(gone_at, store.set_available, False)
            loop.call_at(back_at, store.set_available, True)
        for number in range(scenario.num_gateways):
            gateway = SimulatedGateway(
                loop,
                scenario.config,
                self._workers,
                random.Random(self._rng.random()),
                wire_delay_s=scenario.wire_delay_s,
                kv_event_delay_s=scenario.kv_event_delay_s,
                name=GatewayId(f"gateway-{number}"),
                store=store,
            )
            gateway.open()
            self._gateways.append(gateway)
        for worker in self._workers.values():
            worker.start(self._rng.random())
        sampler = asyncio.create_task(self._sample(), name="sampler")
        async with asyncio.TaskGroup() as clients:
            for request in self._traffic:
                await asyncio.sleep(max(0.0, request.arrival_s - loop.now()))
                gateway = self._rng.choice(self._gateways)
                clients.create_task(self._client(gateway, request))
        virtual_s = loop.now()
        sampler.cancel()
        for gateway in self._gateways:
            await gateway.close()
        busy = {
            worker_id: (worker.engine.prefill_s + worker.engine.decode_s) / virtual_s if virtual_s else 0.0
            for worker_id, worker in self._workers.items()
        }
        num_orders = sum(gateway.wires.num_orders for gateway in self._gateways)
        return Run(tuple(self._outcomes), tuple(self._samples), len(self._workers), virtual_s, busy, num_orders)

    def _make_workers(self, loop: VirtualLoop) -> list[SimulatedWorker]:
        scenario = self._scenario
        made = []
        for role, count in ((Role.PREFILL, scenario.num_prefill), (Role.DECODE, scenario.num_decode)):
            for number in range(count):
                record = WorkerRecord(
                    worker_id=WorkerId(f"{role}-{number}"),
                    role=role,
                    epoch=_EPOCH,
                    state=WorkerState.READY,
                    address=f"{role}-{number}.simulated:1",
                    host=f"{role}-{number}.simulated",
                    rack=f"rack-{number % scenario.num_racks}",
                    zone="simulated",
                    layout_fingerprint=_WEIGHTS,
                    weights_version=_WEIGHTS,
                    kv_bytes_per_token=scenario.machine.kv_bytes_per_token,
                    block_size=scenario.block_tokens,
                    max_model_len=scenario.max_model_len,
                )
                made.append(
                    SimulatedWorker(
                        loop,
                        record,
                        scenario.machine,
                        scenario.terms,
                        output_tokens=self._outputs.__getitem__,
                        on_gaps=self._gaps.__setitem__,
                        on_cache=self._on_cache,
                    )
                )
        return made

    def _on_cache(self, batch: KvEventBatch) -> None:
        for gateway in self._gateways:
            gateway.tell_cache(batch)

    async def _client(self, gateway: SimulatedGateway, request: SimulatedRequest) -> None:
        loop = virtual_loop()
        started_at = loop.now()
        first_at: float | None = None
        num_tokens = 0
        completion: Completion | None = None
        failure = ""
        sampling = SamplingParams(max_tokens=request.max_tokens)
        generate = GenerateRequest(
            RequestId(request.request_id), self._prompt[: request.prompt_tokens], sampling, tenant=request.tenant
        )
        hashes = PromptHashes.known({HashKey(_WEIGHTS, self._scenario.block_tokens): request.hashes})
        config = self._scenario.config
        wish = ServiceWish(request.service_class, slo=request.slo, session_id=request.session_id)
        try:
            stream = gateway.dispatcher.submit(
                generate,
                hashes,
                arrived_at=started_at,
                timeout_s=config.request_timeout_s,
                service=service_terms(wish, request.tenant, config),
            )
            bell = Bell(self._turns)
            stream.wake(bell)
            while completion is None:
                await bell.wait()
                tokens, completion = stream.take()
                if tokens and first_at is None:
                    first_at = loop.now()
                num_tokens += len(tokens)
        except RejectedError as error:
            failure = error.reason
        except ServingError as error:
            failure = type(error).__name__
        self._outcomes.append(
            Outcome(
                request=request,
                failure=failure,
                ttft_s=None if first_at is None else first_at - started_at,
                total_s=None if completion is None else loop.now() - started_at,
                num_tokens=num_tokens,
                cached_tokens=completion.cached_tokens if completion is not None else 0,
                gaps=self._gaps.pop(request.request_id, ()),
                placement=completion.placement if completion is not None else None,
                num_asked=completion.num_asked if completion is not None else 0,
            )
        )

    async def _sample(self) -> None:
        loop = virtual_loop()
        prefill = [worker for worker in self._workers.values() if worker.record.role is Role.PREFILL]
        decode = [worker for worker in self._workers.values() if worker.record.role is Role.DECODE]
        while True:
            self._samples.append(
                LoadSample(
                    loop.now(),
                    tuple(worker.engine.queued_tokens for worker in prefill),
                    tuple(worker.engine.num_running for worker in decode),
                    tuple(worker.engine.context_tokens for worker in decode),
                )
            )
            await asyncio.sleep(self._scenario.sample_interval_s)
