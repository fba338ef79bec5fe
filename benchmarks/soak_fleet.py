"""The soak's workers: real senders and receivers over real or in-memory control streams, which can be started again.

A worker keeps its pool over its lives, so that a block which a dead incarnation leaked stays missing.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc
import torch
from prometheus_client import CollectorRegistry

from benchmarks.soak_codecs import ENCODERS, PlannedChooser
from benchmarks.soak_faults import Plan
from benchmarks.soak_pool import Ledger, OwnedPool
from benchmarks.soak_wires import BadDialer, BadLinks
from core.clock import MonotonicClock
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from core.rpc import bind, create_server
from kv_transfer.carriers.links import open_links
from kv_transfer.carriers.memory_control import MemoryDialer
from kv_transfer.config import KvTransferConfig
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import LandedStats, Peer
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.rpc import GrpcDialer, add_kv_transfer
from kv_transfer.sender.sender import KvSender


class Outcomes:
    """What one worker's owner is told. Exactly once per transfer, or it is noted."""

    def __init__(
        self,
        name: str,
        ledger: Ledger,
        on_end: Callable[[TransferId, str], None],
        on_landed: Callable[[TransferId, LandedStats], None] = lambda transfer_id, stats: None,
    ) -> None:
        self._on_landed = on_landed
        self._name = name
        self._ledger = ledger
        self._on_end = on_end
        self.told: dict[TransferId, asyncio.Future[str]] = {}

    def due(self, transfer_id: TransferId) -> asyncio.Future[str]:
        """Say that an outcome will follow."""
        future = self.told[transfer_id] = asyncio.get_running_loop().create_future()
        return future

    def on_acked(self, transfer_id: TransferId) -> None:
        self._tell(transfer_id, "acked")

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        self._on_landed(transfer_id, stats)
        self._tell(transfer_id, "landed")

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        self._tell(transfer_id, reason)

    def _tell(self, transfer_id: TransferId, outcome: str) -> None:
        future = self.told.get(transfer_id)
        if future is None or future.done():
            was = "nothing was due" if future is None else f"it had been {future.result()}"
            self._ledger.violated(f"{transfer_id}: {self._name} was told {outcome}, but {was}")
            return
        self._on_end(transfer_id, outcome)
        future.set_result(outcome)


@dataclass
class World:
    """What all workers share."""

    config: KvTransferConfig
    layout: KvLayout
    ledger: Ledger
    plans: Mapping[TransferId, Plan]
    truth: dict[RequestId, torch.Tensor]
    num_blocks: int
    is_grpc: bool
    receivers: "dict[str, KvReceiver]" = field(default_factory=dict)  # by address, for streams in memory


class PrefillSide:
    """A sender, its pool and its bad wires."""

    def __init__(self, name: str, world: World) -> None:
        self._world = world
        self._name = name
        self._epoch = 0
        self.is_restarting = False
        self.pool = OwnedPool(name, world.layout, world.num_blocks, world.ledger, world.truth)
        self.outcomes = Outcomes(name, world.ledger, self._end)
        self.metrics = KvTransferMetrics(CollectorRegistry())
        self.chooser = PlannedChooser(world.plans, world.ledger)
        self.links = BadLinks(open_links(world.config), world.plans, world.ledger)
        self.dialer = BadDialer(
            GrpcDialer() if world.is_grpc else MemoryDialer(world.receivers), world.plans, world.ledger
        )
        self.sender: KvSender

    async def start(self) -> None:
        self._epoch += 1
        self.links = BadLinks(open_links(self._world.config), self._world.plans, self._world.ledger)
        self.sender = KvSender(
            self._world.config,
            WorkerIdentity(WorkerId(self._name), Epoch(self._epoch), "soak"),
            self._world.layout,
            self.pool,
            self.outcomes,
            MonotonicClock(),
            links=self.links,
            dialer=self.dialer,
            metrics=self.metrics,
            chooser=self.chooser,
        )

    async def stop(self) -> None:
        await self.sender.close()

    def _end(self, transfer_id: TransferId, outcome: str) -> None:
        self.pool.free(self._world.plans[transfer_id].request_id)


class DecodeSide:
    """A receiver, its pool and, over gRPC, its server."""

    def __init__(self, name: str, world: World) -> None:
        self._world = world
        self._name = name
        self._epoch = 0
        self.is_restarting = False
        self._server: grpc.aio.Server | None = None
        self.pool = OwnedPool(name, world.layout, world.num_blocks, world.ledger, world.truth)
        self.outcomes = Outcomes(name, world.ledger, self._end, self._check)
        self.metrics = KvTransferMetrics(CollectorRegistry())
        self.links = BadLinks(open_links(world.config), world.plans, world.ledger)
        self.receiver: KvReceiver
        self.peer: Peer

    async def start(self) -> None:
        self._epoch += 1
        identity = WorkerIdentity(WorkerId(self._name), Epoch(self._epoch), "soak")
        self.links = BadLinks(open_links(self._world.config), self._world.plans, self._world.ledger)
        self.receiver = KvReceiver(
            self._world.config,
            identity,
            self._world.layout,
            self.pool,
            self.outcomes,
            MonotonicClock(),
            links=self.links,
            metrics=self.metrics,
        )
        address = f"{self._name}@{self._epoch}"
        if self._world.is_grpc:
            self._server = create_server()
            add_kv_transfer(self.receiver, self._server)
            address = f"127.0.0.1:{bind(self._server, '127.0.0.1', 0)}"
            await self._server.start()
        self._world.receivers[address] = self.receiver
        self.peer = Peer(identity.worker_id, identity.epoch, address)

    async def stop(self) -> None:
        del self._world.receivers[self.peer.address]
        await self.receiver.close()
        if self._server is not None:
            await self._server.stop(None)

    def _check(self, transfer_id: TransferId, stats: LandedStats) -> None:
        plan = self._world.plans[transfer_id]
        if ENCODERS[plan.profile].is_lossless and not stats.profile_is_lossless:
            self._world.ledger.violated(f"{transfer_id}: {plan.profile} is lossless, and is said not to be")
        self.pool.check_landed(plan.request_id, plan.held_tokens, is_exact=stats.profile_is_lossless)

    def _end(self, transfer_id: TransferId, outcome: str) -> None:
        self.pool.free(self._world.plans[transfer_id].request_id)
