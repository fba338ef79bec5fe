"""One link per worker incarnation: kept connected while the worker is registered, its end reported at once.

Life of a link:
1. A record with an address and a serving state appears: the link connects, again and again with back-off and jitter.
2. The worker welcomes this epoch: UP, the listener hears of it, work may be sent.
3. The stream ends, or a defect of ours breaks it: DOWN, the listener hears of it before anything else happens, and the
   link reconnects.
4. The record leaves the mirror: the link stays up as long as its stream does (the store may be wrong, the stream is
   not), and is not rebuilt after that. A record with a newer epoch cuts it at once: the old incarnation is fenced."""

import asyncio
import logging
import random
from collections.abc import Mapping

from core.clock import Clock
from core.errors import ServingError, WorkerLost
from core.ids import Epoch, GatewayId, TransferId, WorkerId
from core.membership import LoadReport, WorkerRecord, WorkerState
from core.tls import PeerTls
from router.config import WorkerStreamConfig
from router.forwarding.worker_port import DecodeOrder, PrefillOrder, WorkerListener
from router.messages import WorkEvents
from router.mirror import CacheSnapshot
from router.worker_rpc import DecodeChannel, PrefillChannel, WorkerChannel, open_channel

_log = logging.getLogger(__name__)
_CONNECTABLE = (WorkerState.READY, WorkerState.DRAINING)


class WorkerLink:
    """One incarnation."""

    def __init__(self, record: WorkerRecord, channel: WorkerChannel) -> None:
        self.worker_id = record.worker_id
        self.epoch = record.epoch
        self.channel = channel
        self.is_up = False
        self.is_wanted = True
        self.task: asyncio.Task[None] | None = None


class WorkerPool:
    """All links of one gateway. Implements `router.forwarding.worker_port.WorkerPort`.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self,
        gateway_id: GatewayId,
        config: WorkerStreamConfig,
        clock: Clock,
        rng: random.Random,
        tls: PeerTls | None = None,
    ) -> None:
        self._gateway_id = gateway_id
        self._config = config
        self._clock = clock
        self._rng = rng
        self._tls = tls.client if tls is not None else None
        self._listener: WorkerListener | None = None
        self._links: dict[WorkerId, WorkerLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def listen(self, listener: WorkerListener) -> None:
        """Tell `listener` from now on."""
        self._listener = listener

    def reconcile(self, records: Mapping[WorkerId, WorkerRecord]) -> None:
        """Make links fit the records."""
        for worker_id, link in list(self._links.items()):
            record = records.get(worker_id)
            if record is None:
                link.is_wanted = False
                if not link.is_up:
                    self._cut(link)
            elif record.epoch > link.epoch:
                self._cut(link)
        for record in records.values():
            if (known := self._links.get(record.worker_id)) is not None:
                known.is_wanted = True
            elif record.address and record.state in _CONNECTABLE:
                self._open(record)

    def connected_epoch(self, worker_id: WorkerId) -> Epoch | None:
        """Epoch of the live stream to a worker, None without one."""
        link = self._links.get(worker_id)
        return link.epoch if link is not None and link.is_up else None

    def prefill(self, worker_id: WorkerId) -> PrefillChannel | None:
        """Return the live channel to a prefill worker."""
        channel = self._live_channel(worker_id)
        return channel if isinstance(channel, PrefillChannel) else None

    def decode(self, worker_id: WorkerId) -> DecodeChannel | None:
        """Return the live channel to a decode worker."""
        channel = self._live_channel(worker_id)
        return channel if isinstance(channel, DecodeChannel) else None

    def submit_prefill(self, worker_id: WorkerId, order: PrefillOrder) -> bool:
        channel = self.prefill(worker_id)
        if channel is not None:
            channel.submit(order)
        return channel is not None

    def submit_decode(self, worker_id: WorkerId, order: DecodeOrder) -> bool:
        channel = self.decode(worker_id)
        if channel is not None:
            channel.submit(order)
        return channel is not None

    def bind(self, worker_id: WorkerId, work_id: TransferId, decode: WorkerRecord | None) -> bool:
        channel = self.prefill(worker_id)
        if channel is not None:
            channel.bind(work_id, decode)
        return channel is not None

    def abort(self, worker_id: WorkerId, work_id: TransferId, reason: str) -> None:
        channel = self._live_channel(worker_id)
        if channel is not None:
            channel.abort(work_id, reason)

    async def fetch_snapshot(self, record: WorkerRecord) -> CacheSnapshot:
        """Ask a connected worker for what its prefix cache holds. Raises: ServingError."""
        channel = self._live_channel(record.worker_id)
        if channel is None:
            raise WorkerLost(f"{record.worker_id} is not connected")
        return await channel.list_cached_blocks()

    async def close(self) -> None:
        """Cut all links; returns when all is closed."""
        for link in list(self._links.values()):
            self._cut(link)
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def _live_channel(self, worker_id: WorkerId) -> WorkerChannel | None:
        link = self._links.get(worker_id)
        return link.channel if link is not None and link.is_up else None

    def _open(self, record: WorkerRecord) -> None:
        link = WorkerLink(record, open_channel(record, self._gateway_id, self._config, self._tls))
        self._links[record.worker_id] = link
        link.task = asyncio.create_task(self._keep(link), name=f"link to {record.worker_id}/{record.epoch}")
        self._closing.add(link.task)
        link.task.add_done_callback(self._closing.discard)

    def _cut(self, link: WorkerLink) -> None:
        if self._links.get(link.worker_id) is link:
            del self._links[link.worker_id]
        self._take_down(link, WorkerLost(f"{link.worker_id} of epoch {link.epoch} left the cluster"))
        if link.task is not None:
            link.task.cancel()

    async def _keep(self, link: WorkerLink) -> None:
        backoff_s = self._config.reconnect_min_s
        try:
            while link.is_wanted:
                opened_at = self._clock.now()
                try:
                    await link.channel.serve(
                        on_welcome=lambda: self._bring_up(link),
                        on_report=lambda report: self._pass_on(link.worker_id, report),
                    )
                except ServingError as error:
                    self._take_down(link, error)
                except Exception as error:
                    # Ours, most likely: whoever was told of a report could not bear it. What the link carried is lost.
                    _log.exception("a defect broke the link to %s of epoch %d", link.worker_id, link.epoch)
                    self._take_down(link, WorkerLost(f"a defect of the gateway broke the link: {error}"))
                if self._clock.now() - opened_at > self._config.reconnect_max_s:
                    backoff_s = self._config.reconnect_min_s
                await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, self._config.reconnect_max_s)
        finally:
            if self._links.get(link.worker_id) is link:
                del self._links[link.worker_id]  # however it ended: the next reconciliation opens a new one
            self._take_down(link, WorkerLost(f"the link to {link.worker_id} ended"))
            await link.channel.close()

    def _bring_up(self, link: WorkerLink) -> None:
        link.is_up = True
        _log.info("connected to %s of epoch %d", link.worker_id, link.epoch)
        if self._listener is not None:
            self._listener.on_up(link.worker_id)

    def _take_down(self, link: WorkerLink, error: ServingError) -> None:
        if not link.is_up:
            return
        link.is_up = False
        _log.warning("lost %s of epoch %d: %s", link.worker_id, link.epoch, error)
        if self._listener is not None:
            self._listener.on_down(link.worker_id, error)

    def _pass_on(self, worker_id: WorkerId, report: WorkEvents | LoadReport) -> None:
        if self._listener is None:
            return
        if isinstance(report, LoadReport):
            self._listener.on_load(worker_id, report)
        else:
            self._listener.on_work_events(worker_id, report)
