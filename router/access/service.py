"""Access control of one gateway, whole: the gatekeeper, what feeds it, and the record of admin actions."""

import asyncio

from core.clock import Clock
from core.ids import GatewayId
from core.store import Store
from router.access.audit import AuditLog
from router.access.config import AccessConfig
from router.access.gatekeeper import Gatekeeper
from router.access.sources import KeySources
from router.metrics import GatewayMetrics


class AccessControl:
    """Made with the gateway; `start` before its doors open, then `run` as a task, `close` in the end.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self,
        config: AccessConfig,
        store: Store,
        cluster: str,
        gateway_id: GatewayId,
        clock: Clock,
        metrics: GatewayMetrics,
    ) -> None:
        self.gatekeeper = Gatekeeper(config, clock=clock, on_refused=metrics.rejected)
        self.keys = KeySources(self.gatekeeper, store, cluster)
        self.audit = AuditLog(gateway_id)
        self._config = config

    async def start(self) -> None:
        """Read the keys and open the record.

        Raises:
            ConfigError: a file cannot be read or written.
        """
        if self._config.enabled:
            await self.keys.load()
        if self._config.audit_file is not None:
            self.audit.open(self._config.audit_file)

    async def run(self) -> None:
        """Keep up with keys that come and go, until cancelled."""
        if not self._config.enabled:
            await asyncio.Event().wait()  # nothing is ever to be done, and whoever ends is taken for broken
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.keys.run(), name="API keys")
            for issuer in self.gatekeeper.issuers:
                tasks.create_task(issuer.run(), name="issuer's keys")

    def close(self) -> None:
        self.audit.close()
