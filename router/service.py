"""One gateway process: builds the parts, runs them, stops them.

start: tokenizer and model facts are read, the port is bound, the mirror and the links begin.
stop: health says NOT_SERVING, new requests are refused, running ones get until the deadline, the rest are aborted. A
port that others share is left first: new connections come to them.
"""

import asyncio
import contextlib
import logging
import random
import time

from core.clock import Clock
from core.errors import Aborted, ConfigError
from core.ids import Epoch, WorkerId, new_gateway_id, new_nonce
from core.store import Store
from core.telemetry import MetricsServer
from grammar.host import ModelTokens
from grammar.service import GrammarService
from router.access.gatekeeper import Gatekeeper
from router.access.service import AccessControl
from router.cluster_link import ClusterLink
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.fleet import Fleet
from router.front import Front, longest_request
from router.http.app import create_app
from router.http.door import Door
from router.http.server import HttpServer
from router.intake import Intake
from router.metrics import GatewayMetrics
from router.quotas.service import Quotas
from router.replicas.gateway_state import GatewayState
from router.replicas.service import Replicas
from router.resume.metrics import ResumeMetrics
from router.resume.service import Resumables
from router.rpc.server import GatewayServer
from router.tokenizer import GatewayTokenizer, read_model_facts

_log = logging.getLogger(__name__)
_OBSERVE_S = 0.5


class Gateway:
    """The router and its public gRPC surface.

    Args:
        rng: draws seeds and breaks ties; the system's generator by default.
    """

    def __init__(
        self, config: RouterConfig, cluster: str, store: Store, clock: Clock, *, rng: random.Random | None = None
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._gateway_id = new_gateway_id()
        self._metrics = GatewayMetrics()
        self._access = AccessControl(config.access, store, cluster, self._gateway_id, clock, self._metrics)
        self._link = ClusterLink(config, cluster, self._gateway_id, store, clock, self._rng)
        self._fleet = self._link.fleet
        self._dispatcher = Dispatcher(config, self._fleet, clock, self._rng, self._metrics)
        shared = GatewayState(
            self._fleet.credit,
            self._fleet.table,
            self._dispatcher.affinity,
            self._dispatcher.breakers,
            clock,
            epoch_of=self._epoch_of,
        )
        self._replicas = Replicas(
            store, cluster, self._gateway_id, clock, config.sharing, shared, abort_here=self._abort_here
        )
        self._resumables = Resumables(
            store,
            cluster,
            self._gateway_id,
            clock,
            config.resume,
            ResumeMetrics(self._metrics.registry),
            new_nonce=lambda: new_nonce(self._rng),
            is_alive=lambda gateway_id: gateway_id in self._replicas.peers,
            patience_s=2 * config.sharing.whole_interval_s,
        )
        shared.tell(self._replicas)
        self._quotas = Quotas(
            store,
            cluster,
            self._gateway_id,
            clock,
            config.quotas,
            tenant_config=config.tenant,
            num_replicas=lambda: self._replicas.num_replicas,
        )
        self._intake: Intake | None = None
        self._grammars: GrammarService | None = None
        self._front: Front | None = None
        self._server: GatewayServer | None = None
        self._http: HttpServer | None = None
        self._metrics_server: MetricsServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False
        self._stopped = asyncio.Event()

    @property
    def metrics(self) -> GatewayMetrics:
        return self._metrics

    @property
    def metrics_port(self) -> int:
        """Where metrics are served; 0: nowhere."""
        return self._metrics_server.port if self._metrics_server is not None else 0

    @property
    def http_address(self) -> str:
        """host:port of the HTTP surface; empty: there is none. Only once started."""
        return "" if self._http is None else f"{self._config.http_host}:{self._http.port}"

    @property
    def front(self) -> Front:
        """What every surface calls. Only once started."""
        assert self._front is not None, "the gateway has not started"
        return self._front

    @property
    def gatekeeper(self) -> Gatekeeper:
        """Whom every surface asks who is calling."""
        return self._access.gatekeeper

    @property
    def fleet(self) -> Fleet:
        return self._fleet

    @property
    def dispatcher(self) -> Dispatcher:
        return self._dispatcher

    @property
    def replicas(self) -> Replicas:
        return self._replicas

    @property
    def resumables(self) -> Resumables:
        return self._resumables

    @property
    def quotas(self) -> Quotas:
        return self._quotas

    async def start(self) -> str:
        """Bind and begin to serve. Returns host:port.

        Raises:
            ConfigError: the checkpoint folder or a port cannot be used; nothing is left running.
        """
        config = self._config
        facts = await asyncio.to_thread(read_model_facts, config.model_path)
        tokenizer = await asyncio.to_thread(
            GatewayTokenizer.load,
            config.model_path,
            chat_template=config.chat_template,
            tool_format=config.tool_format,
            max_prompt_characters=config.max_prompt_bytes,
        )
        await self._access.start()
        server = GatewayServer(self._access, max_request_bytes=config.max_request_bytes, share_port=config.share_port)
        try:
            port = server.bind(config.host, config.port, config.tls)
            if config.http.enabled:
                self._http = HttpServer(
                    config.http,
                    host=config.http_host,
                    port=config.http_port,
                    tls=config.tls,
                    write_timeout_s=config.write_timeout_s,
                    share_port=config.share_port,
                )
            if config.metrics_port is not None:
                self._metrics_server = MetricsServer(self._metrics.registry, config.metrics_host, config.metrics_port)
                _log.info("metrics are served at %s:%d", config.metrics_host, self._metrics_server.port)
        except ConfigError:
            await server.stop()
            self._access.close()
            if self._http is not None:
                await self._http.stop()
            raise
        self._grammars = GrammarService(
            config.grammar,
            ModelTokens(config.model_path, facts.vocab_size, facts.eos_token_ids),
            self._clock,
        )
        self._intake = Intake(
            config,
            tokenizer,
            facts,
            self._rng,
            grammars=self._grammars,
            max_model_len=lambda: longest_request(config, facts, self._fleet),
            hash_keys=self._fleet.hash_keys,
        )
        front = Front(
            config,
            self._cluster,
            self._gateway_id,
            tokenizer=tokenizer,
            facts=facts,
            intake=self._intake,
            fleet=self._fleet,
            dispatcher=self._dispatcher,
            quotas=self._quotas,
            metrics=self._metrics,
            clock=self._clock,
            resumables=self._resumables,
            abort_elsewhere=self._replicas.abort,
        )
        self._server = server
        self._front = front
        await server.start(front, self._link)
        if self._http is not None:
            door = Door(front, self.gatekeeper, config.http, time.time)
            await self._http.start(create_app(door, self._metrics.registry))
            _log.info("HTTP is served at %s", self.http_address)
        self._tasks = [
            asyncio.create_task(self._link.run(self._dispatcher), name="cluster link"),
            asyncio.create_task(self._replicas.run(), name="replicas"),
            asyncio.create_task(self._resumables.run(), name="resumable streams"),
            asyncio.create_task(self._quotas.run(), name="quotas"),
            asyncio.create_task(self._access.run(), name="access"),
            asyncio.create_task(self._observe(front, server), name="gateway observer"),
        ]
        address = f"{config.host}:{port}"
        _log.info("gateway %s serves %s at %s", self._gateway_id, config.model_name, address)
        return address

    async def run(self) -> None:
        """Return once stopped. Raises what ended the gateway otherwise."""
        stopped = asyncio.create_task(self._stopped.wait(), name="gateway stopped")
        try:
            await asyncio.wait([stopped, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done() and not task.cancelled():
                    task.result()
        finally:
            stopped.cancel()

    async def stop(self, deadline_s: float) -> None:
        """Refuse new requests, let running ones finish within `deadline_s`, abort the rest, close all. Idempotent."""
        if self._is_stopping:
            await self._stopped.wait()
            return
        self._is_stopping = True
        self._dispatcher.begin_drain()
        leaving: asyncio.Task[None] | None = None
        if self._server is not None:
            await self._server.drain()
            if self._config.share_port:
                leaving = asyncio.create_task(self._server.leave_port(deadline_s), name="leaving the port")
        if self._http is not None and self._config.share_port:
            self._http.leave_port()
        if not await self._dispatcher.wait_idle(deadline_s):
            _log.warning("aborting %d requests that did not finish in time", self._dispatcher.num_active)
        self._dispatcher.close(Aborted("the gateway is stopping"))
        if self._server is not None:
            await self._server.stop()
        if leaving is not None:
            await leaving
        if self._http is not None:
            await self._http.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._resumables.close()
        await self._replicas.leave()
        await self._quotas.close()
        self._access.close()
        if self._intake is not None:
            self._intake.close()
        if self._grammars is not None:
            await self._grammars.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        self._stopped.set()

    async def _observe(self, front: Front, server: GatewayServer) -> None:
        """Keep health and gauges in step with the fleet."""
        while True:
            news = self._fleet.changed.next()
            await server.set_serving(serving=front.is_serving())
            self._metrics.staleness.set(self._fleet.staleness_s)
            self._metrics.replicas.set(self._replicas.num_replicas)
            self._metrics.replica_silence.set(self._replicas.age_s)
            self._metrics.quotas_alone.set(self._quotas.is_store_lost)
            self._metrics.index_bytes.set(self._fleet.index.num_bytes)
            self._dispatcher.observe()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_OBSERVE_S):
                    await news.wait()

    def _abort_here(self, request_id: str, tenant: str) -> bool:
        """Another gateway's client asks."""
        reason = "aborted by an Abort call at another gateway"
        return self._front is not None and self._front.abort_here(request_id, reason, tenant=tenant)

    def _epoch_of(self, worker_id: WorkerId) -> Epoch | None:
        record = self._fleet.records.get(worker_id)
        return None if record is None else record.epoch
