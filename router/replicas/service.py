"""Keeps the gateways of one cluster in step through one stream of the shared store.

1. A change of what this gateway shares is published at once, the next ones after `publish_interval_s`, together; all of
   it once per `whole_interval_s`, idle or not: who is silent for `silent_after_s` has died, and its credit lapses.
2. What the others publish is taken in as it comes: their credit counts as load of the workers, and the loads that
   workers told them, their sessions and their breakers as this gateway's own.
3. When the store is gone each gateway goes on with its own knowledge; what the others said lapses. When it is back the
   stream is read from its start (a store may have forgotten ids, too); what was seen is known by its number.
4. An abort of a request that is not here is asked of all others (`router.replicas.aborts`).
5. A gateway that starts reads what the stream still holds (seconds of it, with a whole message of each peer).

Two gateways may decide within the milliseconds that news takes: the worker's own word (refusal as busier) stands
against that, not this.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable

from core.clock import Clock
from core.errors import ProtocolError, StoreUnavailable
from core.ids import GatewayId, WorkerId
from core.store import STREAM_START, Store, StreamEntry
from router.replicas.aborts import AbortRounds
from router.replicas.codec import news_from_bytes, news_to_bytes
from router.replicas.config import SharingConfig
from router.replicas.draft import Draft
from router.replicas.news import AbortAsk
from router.replicas.peers import PeerBook
from router.replicas.shared_state import SharedState

_log = logging.getLogger(__name__)
_ENTRIES_PER_READ = 256
_ANSWER_S = 2.0


def news_stream(cluster: str) -> str:
    return f"tandem:{cluster}:gateway_news"


class Replicas:
    """One gateway's part. Implements `router.replicas.shared_state.ChangeNotes`.

    Concurrency: the event loop's thread; `run` is one task.
    """

    def __init__(
        self,
        store: Store,
        cluster: str,
        gateway_id: GatewayId,
        clock: Clock,
        config: SharingConfig,
        state: SharedState,
        *,
        abort_here: Callable[[str, str], bool],
    ) -> None:
        self._store = store
        self._stream = news_stream(cluster)
        self._gateway_id = gateway_id
        self._clock = clock
        self._config = config
        self._state = state
        self._aborts = AbortRounds(abort_here)
        self._draft = Draft(gateway_id, state, self._aborts, bindings_per_message=config.bindings_per_message)
        self._peers = PeerBook(config.silent_after_s)
        self._num_peers = 0  # as of the last time that the store answered
        self._changed = asyncio.Event()
        self._is_store_lost = False
        self._settled_at = clock.now()  # all who live have spoken up by then

    @property
    def num_replicas(self) -> int:
        """Gateways of this cluster, this one included, as far as known; during an outage: as before it."""
        return 1 + self._num_peers

    @property
    def age_s(self) -> float:
        """How old what is known of the others may be: the longest silence among them."""
        return self._peers.age_s(self._clock.now())

    @property
    def peers(self) -> frozenset[GatewayId]:
        """Those whose word counts now."""
        return frozenset(self._peers.gateways)

    def note_credit(self, worker_id: WorkerId) -> None:
        self._draft.note_credit(worker_id)
        self._changed.set()

    def note_session(self, session_id: str) -> None:
        self._draft.note_session(session_id)
        self._changed.set()

    def note_breaker(self, worker_id: WorkerId) -> None:
        self._draft.note_breaker(worker_id)
        self._changed.set()

    async def abort(self, request_id: str, tenant: str) -> bool:
        """Abort a tenant's request at whichever other gateway it runs. Returns whether any had it.

        Raises:
            StoreUnavailable: they cannot be asked now, or one that lives did not answer.
        """
        if self._is_store_lost and self._num_peers:
            raise StoreUnavailable("the other gateways cannot be asked: the shared store is away")
        if (unsettled_s := self._settled_at - self._clock.now()) > 0:
            await asyncio.sleep(unsettled_s)
        opened = self._aborts.begin(AbortAsk(secrets.token_hex(8), request_id, tenant), self.peers)
        self._changed.set()
        try:
            async with asyncio.timeout(self._config.silent_after_s + _ANSWER_S):
                await opened.settled.wait()
        except TimeoutError as error:
            silent = ", ".join(sorted(opened.waiting_for))
            raise StoreUnavailable(f"not all gateways answered: {silent}") from error
        finally:
            self._aborts.end(opened)
        if self._is_store_lost and not opened.is_found:
            raise StoreUnavailable("the shared store went away while the other gateways were asked")
        return opened.is_found

    async def run(self) -> None:
        """Tell and listen until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell(), name="tell the other gateways")
            group.create_task(self._listen(), name="listen to the other gateways")

    async def leave(self) -> None:
        """Tell the others that nothing of this gateway counts any more; they find out by its silence otherwise."""
        with contextlib.suppress(StoreUnavailable):
            await self._append(news_to_bytes(self._draft.farewell()))

    async def _tell(self) -> None:
        whole_at = self._clock.now()
        while True:
            self._changed.clear()
            now = self._clock.now()
            if now < whole_at and self._draft.is_empty:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(whole_at - now):
                        await self._changed.wait()
                continue
            is_whole = now >= whole_at
            try:
                await self._append(news_to_bytes(self._draft.compose(is_whole=is_whole)))
            except StoreUnavailable as error:
                _log.debug("no news to the other gateways: %s", error)
                whole_at = now  # the next one repeats what may be lost
                await asyncio.sleep(self._config.retry_interval_s)
                continue
            if is_whole:
                whole_at = now + self._config.whole_interval_s
            await asyncio.sleep(self._config.publish_interval_s)

    async def _append(self, message: bytes) -> None:
        await self._store.append(self._stream, message, max_entries=self._config.stream_entries)

    async def _listen(self) -> None:
        cursor = STREAM_START
        while True:
            try:
                read = await self._store.read(
                    {self._stream: cursor}, max_entries=_ENTRIES_PER_READ, wait_s=self._config.whole_interval_s
                )
            except StoreUnavailable:  # the mirror of the records tells of it
                self._is_store_lost = True
                cursor = STREAM_START
                self._push(self._peers.lapse(self._clock.now()))
                await asyncio.sleep(self._config.retry_interval_s)
                continue
            if self._is_store_lost:
                self._is_store_lost = False
                self._settled_at = self._clock.now() + 2 * self._config.whole_interval_s
            entries = read.get(self._stream, [])
            for entry in entries:
                self._take(entry)
                cursor = entry.entry_id
            self._push(self._peers.lapse(self._clock.now()))
            self._num_peers = len(self._peers)
            self._aborts.note_peers(self.peers)

    def _take(self, entry: StreamEntry) -> None:
        try:
            news = news_from_bytes(entry.value)
        except ProtocolError as error:
            _log.warning("entry %s of %s is ignored: %s", entry.entry_id, self._stream, error)
            return
        if news.gateway_id == self._gateway_id:
            return
        touched = self._peers.absorb(news, self._clock.now())
        if touched is None:
            return  # read before
        self._push(touched)
        self._aborts.absorb(news.gateway_id, news.aborts_asked, news.aborts_answered)
        if not self._aborts.is_empty:
            self._changed.set()
        for credit in news.credits:
            if credit.load is not None:
                self._state.adopt_load(credit.worker_id, credit.epoch, credit.load)
        for binding in news.bindings:
            self._state.adopt_binding(binding)
        for breaker in news.breakers:
            self._state.adopt_breaker(breaker)

    def _push(self, workers: set[WorkerId]) -> None:
        for worker_id in workers:
            self._state.set_peer_credit(self._peers.credit(worker_id))
