"""Resumable streams, as the surfaces see them.

1. `window`: a call asks for one; `open`: its events go into a log, of which its own connection is the first reader.
2. `follow`: whoever comes back reads on behind the last event that it saw: here, or at any other gateway from the
   mirror in the shared store.
3. Nobody reads for the length of the window: the request is aborted, the log forgotten (`router.resume.lifecycle`).
"""

import asyncio
from collections.abc import Callable

from core.clock import Clock
from core.errors import Aborted, InvalidRequest, ServingError
from core.ids import GatewayId
from core.store import Store
from router.resume.codec import StreamOrigin, mirror_key
from router.resume.config import ResumeConfig
from router.resume.copies import Copies
from router.resume.events import StreamKey, StreamKind
from router.resume.metrics import ResumeMetrics
from router.resume.mirror import Mirror
from router.resume.own_streams import OwnStreams
from router.resume.port import Batches, Follower

_CLOSE_S = 2.0


class Resumables:
    """Those of one gateway. Implements `router.resume.port.StreamKeeper`.

    Args:
        new_nonce: draws what tells one admission of a request id from another.
        is_alive: whether another gateway has been heard lately.
        patience_s: a gateway that has not is believed to be gone after so long.

    Concurrency: the event loop's thread; `run` is one task.
    """

    def __init__(
        self,
        store: Store,
        cluster: str,
        gateway_id: GatewayId,
        clock: Clock,
        config: ResumeConfig,
        metrics: ResumeMetrics,
        *,
        new_nonce: Callable[[], str],
        is_alive: Callable[[GatewayId], bool],
        patience_s: float,
    ) -> None:
        self._cluster = cluster
        self._gateway_id = gateway_id
        self._config = config
        self._metrics = metrics
        self._new_nonce = new_nonce
        self._mirror = Mirror(store, clock, config, metrics)
        self._copies = Copies(
            store,
            gateway_id,
            clock,
            config,
            is_alive=is_alive,
            patience_s=patience_s,
            has_room=lambda: self._own.has_room,
        )
        self._own = OwnStreams(store, clock, config, self._mirror, metrics, other_bytes=lambda: self._copies.num_bytes)

    @property
    def num_streams(self) -> int:
        """Of this gateway, running or kept."""
        return len(self._own)

    @property
    def num_bytes(self) -> int:
        """Of all events kept here."""
        return self._own.num_bytes

    def window(self, asked_s: float | None) -> float:
        if not asked_s:
            return 0.0
        longest_s = self._config.max_window_s
        if not 0.0 < asked_s <= longest_s:
            allowed = f"must be in [0, {longest_s:g}]" if longest_s else "must be 0: no stream is resumable here"
            raise InvalidRequest("resume_window_s", f"{allowed}, got {asked_s!r}")
        self._own.check_room()
        return asked_s

    def open(
        self,
        key: StreamKey,
        kind: StreamKind,
        window_s: float,
        batches: Batches,
        abort: Callable[[ServingError], None],
    ) -> Follower:
        origin = StreamOrigin(self._gateway_id, self._new_nonce(), kind, window_s)
        return self._own.open(key, mirror_key(self._cluster, key), origin, batches, abort)

    async def follow(self, key: StreamKey, after: int | None) -> tuple[StreamKind, Follower]:
        if key in self._own:
            own = self._own.follow(key, after)
            self._metrics.resumed(is_own=True)
            return own.kind, own
        copied = await self._copies.follow(mirror_key(self._cluster, key), after)
        self._metrics.resumed(is_own=False)
        return copied.origin.kind, copied

    async def run(self) -> None:
        """Keep mirrors and copies until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._mirror.run(), name="mirror of resumable streams")
            group.create_task(self._copies.run(), name="copies of resumable streams")

    async def close(self) -> None:
        """Save how streams ended, for readers that go elsewhere; keep nothing here. To be called once all requests have
        ended and nothing is read any more."""
        await self._own.finish(_CLOSE_S)
        self._copies.close(Aborted("the gateway is stopping"))
        await self._own.close(_CLOSE_S)
