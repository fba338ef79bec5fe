"""The only builder of services.

`specs_of` turns a configuration into one supervised service per worker and gateway. The `build_*` functions run inside
the processes, which is why they import what they build: the launcher itself never loads torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cluster.config import ClusterConfig, DecodePool, PrefillPool
from cluster.placement import CoreMap
from cluster.ray_backend import RayBackend
from cluster.service_host import Factory, Seat, Service, Whereabouts
from cluster.supervision.incarnation import Incarnation, ServiceSpec
from cluster.supervision.lifecycle import LifePolicy
from core.clock import MonotonicClock
from core.ids import Epoch, WorkerId
from core.membership import Role, WorkerIdentity
from core.store_redis import RedisStore
from core.telemetry import setup_logging
from core.tls import ClientTls
from engine.config import PROCESS_ENVIRONMENT

Pool = TypeVar("Pool", PrefillPool, DecodePool)
GATEWAY = "gateway"
PACKAGES = (
    "cluster", "core", "decode_workers", "engine", "grammar", "kv_transfer", "prefill_workers", "protos", "router",
    "workers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """How a process reaches the shared store."""

    url: str
    deadline_s: float
    tls: ClientTls | None = None

    def open(self) -> RedisStore:
        return RedisStore(self.url, deadline_s=self.deadline_s, tls=self.tls)


def build_prefill(config: ClusterConfig, identity: WorkerIdentity, store: StoreAddress, seat: Seat) -> Service:
    from prefill_workers.service import prefill_worker

    _log_as(identity.worker_id, config)
    settings = _seated(config, seat).prefill_worker(host=seat.host)
    return prefill_worker(settings, identity, store.open(), MonotonicClock())


def build_decode(config: ClusterConfig, identity: WorkerIdentity, store: StoreAddress, seat: Seat) -> Service:
    from decode_workers.service import decode_worker

    _log_as(identity.worker_id, config)
    settings = _seated(config, seat).decode_worker(host=seat.host)
    return decode_worker(settings, identity, store.open(), MonotonicClock())


@dataclass(frozen=True, slots=True)
class GatewayPorts:
    """Where one gateway listens, fixed also when the configuration says "any", so that clients find a restarted one."""

    grpc: int
    http: int


def build_gateway(config: ClusterConfig, index: int, ports: GatewayPorts, store: StoreAddress, seat: Seat) -> Service:
    from router.service import Gateway

    _log_as(gateway_name(index), config)
    http = config.router.http.model_copy(update={"port": ports.http})
    return Gateway(config.gateway(index, port=ports.grpc, http=http), config.name, store.open(), MonotonicClock())


def gateway_name(index: int) -> WorkerId:
    return WorkerId(f"{GATEWAY}-{index}")


def _log_as(name: str, config: ClusterConfig) -> None:
    """Log to the service's file, or to standard error, which Ray keeps in its session's folder."""
    if config.log_folder is None:
        setup_logging(name, level=config.log_level)
        return
    config.log_folder.mkdir(parents=True, exist_ok=True)
    stream = (config.log_folder / f"{name}.log").open("a", encoding="utf-8", buffering=1)
    setup_logging(name, level=config.log_level, stream=stream)


def _seated(config: ClusterConfig, seat: Seat) -> ClusterConfig:
    """Return the configuration as it holds on one seat: threads and the address of KV links."""
    return config.model_copy(
        update={
            "prefill": _with_threads(config.prefill, seat),
            "decode": _with_threads(config.decode, seat),
            "transfer": config.transfer.model_copy(update={"host": seat.host}),
        }
    )


def _with_threads(pool: Pool, seat: Seat) -> Pool:
    if pool.engine.num_threads is not None:
        return pool
    return pool.model_copy(update={"engine": pool.engine.model_copy(update={"num_threads": seat.num_threads})})


def engine_environment(pool: PrefillPool | DecodePool, num_threads: int) -> tuple[tuple[str, str], ...]:
    """Return what a worker's process needs set before torch loads, on a seat of so many threads. Pure."""
    return tuple(PROCESS_ENVIRONMENT.items()) if (pool.engine.num_threads or num_threads) > 1 else ()


class Blueprint:
    """Specs of all services that run as Ray actors.

    Args:
        cpus: per worker of each pool (`cluster.placement.shares`).
        gateway_ports: of each gateway.
    """

    def __init__(
        self,
        config: ClusterConfig,
        backend: RayBackend,
        store: StoreAddress,
        cpus: dict[str, float],
        gateway_ports: Sequence[GatewayPorts],
    ) -> None:
        self._config = config
        self._backend = backend
        self._store = store
        self._cpus = cpus
        self._gateway_ports = gateway_ports
        self._cores = CoreMap()

    def services(self) -> list[ServiceSpec]:
        prefill = [self._worker(Role.PREFILL, n, build_prefill) for n in range(self._config.prefill.replicas)]
        decode = [self._worker(Role.DECODE, n, build_decode) for n in range(self._config.decode.replicas)]
        return [*prefill, *decode, *map(self._gateway, range(len(self._gateway_ports)))]

    def _worker(self, role: Role, index: int, build: Callable[..., Service]) -> ServiceSpec:
        name = WorkerId(f"{role}-{index}")

        async def spawn(epoch: Epoch) -> Incarnation:
            identity = WorkerIdentity(name, epoch, self._config.name)
            factory: Factory = partial(build, self._config, identity, self._store)
            return await self._backend.spawn(factory, partial(self._seat, name, role), pool=role, bundle=index)

        return ServiceSpec(name, role, spawn, self._policy(self._config.supervision.worker_start_deadline_s))

    def _gateway(self, index: int) -> ServiceSpec:
        factory: Factory = partial(build_gateway, self._config, index, self._gateway_ports[index], self._store)

        def seat(whereabouts: Whereabouts) -> Seat:
            return Seat(frozenset(), 1, self._config.gateway().host)

        async def spawn(epoch: Epoch) -> Incarnation:
            return await self._backend.spawn(factory, seat, pool=None)

        policy = self._policy(self._config.supervision.gateway_start_deadline_s)
        return ServiceSpec(gateway_name(index), GATEWAY, spawn, policy)

    def _seat(self, name: WorkerId, role: Role, whereabouts: Whereabouts) -> Seat:
        cpus = self._cpus[role]
        cores = self._cores.take(name, whereabouts.node, whereabouts.cores, cpus)
        host = whereabouts.address if self._backend.nodes.num_nodes > 1 else "127.0.0.1"
        num_threads = max(1, int(cpus))
        return Seat(cores, num_threads, host, engine_environment(getattr(self._config, role), num_threads))

    def _policy(self, start_deadline_s: float) -> LifePolicy:
        supervision = self._config.supervision
        return LifePolicy(start_deadline_s, supervision.drain_deadline_s, supervision.back_off)
