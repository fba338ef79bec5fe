"""What Kubernetes, load balancers and Prometheus ask: is it alive, is it ready, how is it doing, what is it."""

import asyncio

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from core.version import tandem_version
from router.access.principal import Role
from router.http.door import Door
from router.http.while_connected import json_response


class ProbeRoutes:
    """Nothing here waits for a worker."""

    def __init__(self, door: Door, registry: CollectorRegistry) -> None:
        self._door = door
        self._registry = registry

    async def live(self, request: Request) -> Response:
        """The event loop runs: that is all that a restart could mend."""
        await self._admit_probe(request)
        return json_response({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """A request that came now would be served."""
        await self._admit_probe(request)
        front = self._door.front
        if front.is_draining:
            return json_response({"status": "draining"}, 503)
        if not front.is_serving():
            return json_response({"status": "no workers"}, 503)
        return json_response({"status": "ready"})

    async def version(self, request: Request) -> Response:
        await self._admit_probe(request)
        return json_response({"version": tandem_version()})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format, or OpenMetrics to whoever accepts it."""
        if not self._door.gatekeeper.config.open_metrics:
            await self._door.admit(request, Role.ADMIN)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        body = await asyncio.to_thread(encode, self._registry)  # takes milliseconds, which streams would feel
        return Response(body, headers={"content-type": content_type})

    async def _admit_probe(self, request: Request) -> None:
        if not self._door.gatekeeper.config.open_health:
            await self._door.identify(request)
