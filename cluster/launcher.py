"""Brings a whole cluster up, keeps it up, and takes it down. Order:

1. what can be wrong is looked for before anything is started (`cluster.preflight`);
2. Redis: the embedded one, or a word with yours;
3. Ray, and a reserved place for every worker;
4. workers and gateways, all at once; then every gateway must see every worker.
Any failure takes down what was started and is told in one line. Down: gateways first, so that nothing new comes in,
then the workers, Redis and Ray; whatever is left after the deadlines is killed.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.config import ClusterConfig
from cluster.credentials import with_credentials
from cluster.launch import GATEWAY, PACKAGES, Blueprint, GatewayPorts, StoreAddress
from cluster.placement import demands, shares
from cluster.preflight import check, packages_folder
from cluster.progress import Progress
from cluster.ray_backend import RayBackend, reclaim_signals
from cluster.redis_server import EmbeddedRedis, free_ports
from cluster.side_thread import SideThread
from cluster.supervision.fencing import StoreFencer
from cluster.supervision.incarnation import ServiceSpec, SpawnError
from cluster.supervision.lifecycle import LifePolicy, LifeState
from cluster.supervision.supervisor import ServiceStatus, Supervisor
from cluster.workspace import end_marked, workspace
from core.clock import MonotonicClock
from core.errors import ConfigError, ServingError, StoreUnavailable
from core.ids import WorkerId
from core.membership import WorkerRecord, WorkerState, worker_prefix
from core.store_redis import RedisStore
from tandem_client import Client

_REDIS = WorkerId("redis")
_ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # where to reach one that listens everywhere
_DETAIL_PERIOD_S = 0.3
_SEEN_PERIOD_S = 0.05
_RAY_DOWN_S = 15.0
_GATEWAY_STARTS = "loading the router's loops; compiling them where that is not done yet, once per machine"


class RayLost(ServingError):
    """A daemon of the private Ray cluster died, and the whole launch with it."""


class Launcher:
    """One cluster that is coming up, up, or going down. Made by `launcher_of`.

    Attributes:
        gateway_addresses: host:port of each gateway, fixed before they start.
        http_addresses: likewise, of their HTTP; none without it.
        credentials: what clients need beside the address.
        mark: of all processes of this launch on this machine.
    """

    def __init__(self, config: ClusterConfig, progress: Progress, folder: Path, mark: str) -> None:
        gateway = config.gateway()
        count, replicas = config.num_gateway_ports, config.router.replicas
        free = free_ports(2 * count)
        ports = range(gateway.port, gateway.port + count) if gateway.port else free[:count]
        first = gateway.http_port
        http_ports = range(first, first + count) if first else free[count:]
        self._gateway_ports = tuple(map(GatewayPorts, ports, http_ports)) * (replicas // count)
        host, http_host = (_ANY.get(one, one) for one in (gateway.host, gateway.http_host))
        self.gateway_addresses = tuple(f"{host}:{port}" for port in ports)
        self.http_addresses = tuple(f"{http_host}:{port}" for port in http_ports) if gateway.http.enabled else ()
        self.mark = mark
        self._config, self.credentials = with_credentials(config)
        self._progress = progress
        self._folder = folder
        self._is_up = False
        self._ray_thread = SideThread("ray")
        self._connecting: asyncio.Future[RayBackend] | None = None
        self._backend: RayBackend | None = None
        self._store: RedisStore | None = None
        self._supervisor: Supervisor | None = None

    @property
    def gateway_address(self) -> str:
        """All of them, as clients take it."""
        return ",".join(self.gateway_addresses)

    @property
    def http_urls(self) -> str:
        """Base addresses of OpenAI's API, for people; empty: it is not served."""
        scheme = "http" if self._config.tls.public is None else "https"
        return ", ".join(f"{scheme}://{address}/v1" for address in self.http_addresses)

    async def up(self) -> None:
        """Start everything and return when requests can be served.

        Raises:
            ServingError: in one line, why not. The caller takes down what was started.
        """
        check(self._config)
        address, embedded = self._redis_address()
        self._store = address.open()
        announced_s = self._config.supervision.worker_start_deadline_s + self._config.supervision.back_off.max_s
        fencer = StoreFencer(self._store, self._config.name, announcement_s=announced_s)
        self._supervisor = Supervisor(fencer, MonotonicClock(), random.random, self._progress.service)
        await self._start_redis(embedded)
        blueprint = await self._prepare_ray(address)
        self._progress.phase("starting workers and gateway")
        services = blueprint.services()
        self._supervisor.add(services)
        deadline_s = max(service.policy.start_deadline_s for service in services)
        details = asyncio.create_task(self._show_details())
        try:
            await self._while_ray_lives(self._until_serving([service.name for service in services], deadline_s))
        finally:
            details.cancel()
            await asyncio.wait([details])
        self._is_up = True

    async def run(self) -> None:
        """Wait while the cluster lives. Cancel it to end the wait.

        Raises:
            RayLost: a daemon of the private Ray cluster died.
            Exception: a defect of the supervisor.
        """
        assert self._supervisor is not None, "up first"
        await self._while_ray_lives(self._until_broken(self._supervisor))

    async def down(self) -> None:
        """Stop everything: by draining what is up, by force what never was. Never raises; bounded by deadlines."""
        force = not self._is_up
        if self._connecting is not None and self._backend is None:
            # What is being started could not be found to be killed; begun well, it can be ended well.
            with contextlib.suppress(ServingError, TimeoutError):
                self._backend = await asyncio.wait_for(asyncio.shield(self._connecting), _RAY_DOWN_S)
        is_lost = self._backend is not None and self._backend.is_lost
        if self._supervisor is not None and not is_lost:  # without Ray's daemons nothing can be drained
            services = self._supervisor.status()
            gateways = [service.name for service in services if service.kind == GATEWAY]
            workers = [service.name for service in services if service.name not in (*gateways, _REDIS)]
            for group in (gateways, workers, [service.name for service in services if service.name == _REDIS]):
                await self._supervisor.stop(group, force=force)
        if self._supervisor is not None:
            await self._supervisor.close()
        if self._store is not None:
            await self._store.close()
        if self._backend is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ray_thread.call(self._backend.close), _RAY_DOWN_S)
        await asyncio.to_thread(end_marked, self.mark, 5.0)

    def status(self) -> list[ServiceStatus]:
        return self._supervisor.status() if self._supervisor is not None else []

    def _redis_address(self) -> tuple[StoreAddress, EmbeddedRedis | None]:
        redis = self._config.redis
        if redis.url is not None:
            return StoreAddress(redis.url, redis.deadline_s, redis.tls), None
        folder = self._folder / "redis"
        folder.mkdir()
        embedded = EmbeddedRedis(folder, max_memory_bytes=redis.embedded_max_memory_bytes)
        return StoreAddress(embedded.url, redis.deadline_s), embedded

    async def _start_redis(self, embedded: EmbeddedRedis | None) -> None:
        assert self._supervisor is not None
        assert self._store is not None
        supervision = self._config.supervision
        if embedded is not None:
            policy = LifePolicy(supervision.redis_start_deadline_s, 2.0, supervision.back_off)
            self._supervisor.add([ServiceSpec(_REDIS, "redis", embedded.spawn, policy)])
            await self._supervisor.until_ready([_REDIS], supervision.redis_start_deadline_s)
            return
        try:
            await self._store.ping()
        except StoreUnavailable as error:
            raise ConfigError(f"redis.url: {error}") from error

    async def _prepare_ray(self, address: StoreAddress) -> Blueprint:
        config = self._config
        where = f"the one at {config.ray.address}" if config.ray.address else "a private one"
        self._progress.phase(f"connecting to Ray ({where})")
        wanted = demands(config)
        folder = self._folder / "ray"
        folder.mkdir()
        try:
            self._connecting = self._ray_thread.call(
                RayBackend.connect,
                config.ray,
                namespace=f"tandem-{config.name}",
                packages=packages_folder(),
                names=PACKAGES,
                temp=folder,
            )
            self._backend = await asyncio.wait_for(asyncio.shield(self._connecting), config.ray.connect_timeout_s)
        except TimeoutError:
            raise ConfigError(f"ray: not connected within {config.ray.connect_timeout_s:g} s ({where})") from None
        reclaim_signals()
        nodes = self._backend.nodes
        if nodes.num_nodes > 1 and config.redis.url is None:
            raise ConfigError("redis.url: needed when Ray has several nodes; the embedded Redis serves one machine")
        place = "the Ray cluster" if config.ray.address else "this machine"
        cpus = shares(wanted, cpus=nodes.cpus, gpus=nodes.gpus, where=place)
        for role, pool in ((role, getattr(config, role)) for role in wanted):
            bundle = {"CPU": cpus[role], "GPU": wanted[role].num_gpus, **pool.resources.custom}
            bundle = {kind: amount for kind, amount in bundle.items() if amount > 0}
            await self._ray_thread.call(
                self._backend.reserve,
                role,
                [bundle] * pool.replicas,
                pool.resources.strategy,
                config.ray.place_timeout_s,
            )
        return Blueprint(config, self._backend, address, cpus, self._gateway_ports)

    async def _until_serving(self, names: Sequence[WorkerId], deadline_s: float) -> None:
        assert self._supervisor is not None
        await self._supervisor.until_ready(names, deadline_s)
        await self._until_seen()

    async def _until_broken(self, supervisor: Supervisor) -> None:
        await asyncio.shield(supervisor.broken)

    async def _while_ray_lives(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for the end of `work`.

        Raises:
            RayLost: Ray ended first. Its own end is the cause that is told, of all that follow from it.
        """
        assert self._backend is not None
        lost, working = asyncio.create_task(self._backend.until_lost()), asyncio.create_task(work)
        try:
            await asyncio.wait([lost, working], return_when=asyncio.FIRST_COMPLETED)
            if lost.done() or self._backend.is_lost:
                raise RayLost(f"ray: its {await lost} died; everything was taken down")
            working.result()
        finally:
            for task in (lost, working):
                task.cancel()
            await asyncio.wait([lost, working])

    async def _until_seen(self) -> None:
        """Wait until every gateway has a stream to every worker.

        Raises:
            SpawnError: one does not within the gateways' own start deadline.
        """
        wanted = self._config.prefill.replicas + self._config.decode.replicas
        deadline_s = self._config.supervision.gateway_start_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                key, tls = self.credentials.api_key, self.credentials.tls
                for address in self.gateway_addresses:
                    seen: set[str] = set()
                    while len(seen) < self._config.router.replicas // len(self.gateway_addresses):
                        # A connection of its own each time: where a port is shared, that is how to get to the others.
                        async with Client(address, api_key=key, tls=tls) as client:
                            status = await client.status()
                        # A gateway offers no watch of its fleet, and its health only tells of one worker per role.
                        if status.gateway_id not in seen and sum(one.connected for one in status.workers) >= wanted:
                            seen.add(status.gateway_id)
                        else:
                            await asyncio.sleep(_SEEN_PERIOD_S)
        except TimeoutError:
            raise SpawnError(f"a gateway does not reach every worker within {deadline_s:g} s") from None

    async def _show_details(self) -> None:
        """Pass on what the workers say of themselves while they load, and say what a gateway is busy with."""
        assert self._store is not None
        assert self._supervisor is not None
        while True:
            for status in self._supervisor.status():
                if status.kind == GATEWAY and status.state is LifeState.STARTING:
                    self._progress.detail(status.name, _GATEWAY_STARTS)
            with contextlib.suppress(StoreUnavailable):
                for value in (await self._store.scan(worker_prefix(self._config.name))).values():
                    with contextlib.suppress(ValidationError):
                        record = WorkerRecord.model_validate_json(value)
                        if record.detail and record.state is not WorkerState.STARTING:
                            self._progress.detail(record.worker_id, record.detail)
            await asyncio.sleep(_DETAIL_PERIOD_S)  # the store port has no watch, and these are only for the eye


@contextlib.asynccontextmanager
async def launcher_of(config: ClusterConfig, progress: Progress) -> AsyncIterator[Launcher]:
    """Yield a launcher, to be brought `up`; whatever it started is taken down in the end, whatever the end is."""
    with workspace() as (folder, mark):
        launcher = Launcher(config, progress, folder, mark)
        try:
            yield launcher
        finally:
            await launcher.down()
