"""A sender's links: no more open than it may keep, none to a peer that is down, none faster than it is told."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch
from prometheus_client import CollectorRegistry

from core.clock import ManualClock, MonotonicClock
from core.errors import WorkerLost
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.membership import WorkerIdentity
from kv_transfer.carriers.memory_control import MemoryStream
from kv_transfer.carriers.memory_links import MemoryHub, MemoryLinks
from kv_transfer.config import KvTransferConfig
from kv_transfer.control import ControlStream
from kv_transfer.link import LinkPlan, ReceiveEnd, SendEnd
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import Peer, PeerDown
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.sender.sender import KvSender
from protos import kv_transfer_pb2 as pb
from tests.kv_peers import LAYOUT, PATIENCE_S, ArrayPool, Duo, Outcomes

LAYERS = range(LAYOUT.num_layers)
CONFIG = KvTransferConfig(backend="memory", slot_bytes=4096, credit_bytes=16384, max_links=2)


class CountedLinks:
    """Memory links that know how many sending ends are open, and how many were at most."""

    backend = "memory"

    def __init__(self, hub: MemoryHub) -> None:
        self._inner = MemoryLinks(hub)
        self._lock = threading.Lock()
        self.num_open = self.most_open = self.num_opened = 0
        self.opened = threading.Semaphore(0)

    def host(self) -> str:
        return self._inner.host()

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        end = self._inner.open_send(address, plan)
        with self._lock:
            self.num_opened += 1
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        self.opened.release()
        return _CountedEnd(end, self)

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        return self._inner.open_receive(plan)

    def close(self) -> None:
        self._inner.close()

    def closed(self) -> None:
        with self._lock:
            self.num_open -= 1


class _CountedEnd:
    carrier = "memory"

    def __init__(self, inner: SendEnd, links: CountedLinks) -> None:
        self._inner = inner
        self._links = links
        self.acquire, self.send, self.flush, self.abort = inner.acquire, inner.send, inner.flush, inner.abort

    def close(self) -> None:
        self._inner.close()
        self._links.closed()


class Star:
    """One sender, several receivers, all in memory."""

    def __init__(self, num_receivers: int, config: KvTransferConfig = CONFIG) -> None:
        hub, clock = MemoryHub(), MonotonicClock()
        self.links = CountedLinks(hub)
        self.source, self.target = ArrayPool(), ArrayPool()
        self.sent, self.landed = Outcomes(self.source), Outcomes(self.target)
        self.receivers = [
            KvReceiver(
                config,
                WorkerIdentity(WorkerId(f"decode-{index}"), Epoch(7), "test"),
                LAYOUT,
                self.target,
                self.landed,
                clock,
                links=MemoryLinks(hub),
                metrics=KvTransferMetrics(CollectorRegistry()),
            )
            for index in range(num_receivers)
        ]
        self.sender = KvSender(
            config,
            WorkerIdentity(WorkerId("prefill"), Epoch(3), "test"),
            LAYOUT,
            self.source,
            self.sent,
            clock,
            links=self.links,
            dialer=self,
            metrics=KvTransferMetrics(CollectorRegistry()),
        )

    def dial(self, peer: Peer) -> ControlStream:
        return MemoryStream(self.receivers[int(peer.worker_id.removeprefix("decode-"))])

    async def __aenter__(self) -> "Star":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.sender.close()
        await asyncio.gather(*(receiver.close() for receiver in self.receivers))
        assert self.links.num_open == 0

    async def until_open(self, count: int) -> None:
        for _ in range(count):
            assert await asyncio.to_thread(self.links.opened.acquire, timeout=PATIENCE_S)

    async def begin(self, name: str, receiver: int) -> TransferId:
        transfer_id, request_id = TransferId(name), RequestId(name)
        self.source.fill(request_id, 9)
        self.target.clear(request_id, 9)
        await self.receivers[receiver].expect(transfer_id, request_id, 0, 9)
        await self.sender.offer(transfer_id, request_id, 9, Peer(WorkerId(f"decode-{receiver}"), Epoch(7), "in memory"))
        return transfer_id

    async def end(self, transfer_id: TransferId) -> str:
        self.sender.push(transfer_id, LAYERS, range(4, 9))
        self.sender.commit(transfer_id, 1)
        return await self.sent.outcome(transfer_id)

    async def land(self, name: str, receiver: int) -> None:
        transfer_id = await self.begin(name, receiver)
        self.sender.push(transfer_id, LAYERS, range(4))
        assert await self.end(transfer_id) == "acked"
        request_id = RequestId(name)
        assert torch.equal(self.source.arrays[request_id], self.target.arrays[request_id])


async def test_the_least_recently_used_idle_link_makes_room() -> None:
    async with Star(3) as star:
        for index, receiver in enumerate((0, 1, 0, 2, 0, 1)):
            await star.land(f"t{index}", receiver)
        assert star.links.most_open == 2
        assert star.links.num_opened == 4  # 0 and 1; 2 instead of 1, then 1 instead of 2
        assert star.landed.told.keys() == star.sent.told.keys()


async def test_when_every_link_is_busy_a_new_one_waits_for_a_transfer_to_end() -> None:
    async with Star(3) as star:
        busy = [await star.begin(f"busy{receiver}", receiver) for receiver in (0, 1)]
        for transfer_id in busy:
            star.sender.push(transfer_id, LAYERS, range(4))
        await star.until_open(2)
        waiting = asyncio.create_task(star.land("third", 2))
        assert await star.end(busy[1]) == "acked"
        await asyncio.wait_for(waiting, PATIENCE_S)
        assert await star.end(busy[0]) == "acked"
        assert star.links.most_open == 2


async def test_when_every_link_stays_busy_a_new_one_fails_with_the_reason() -> None:
    async with Star(3, CONFIG.model_copy(update={"open_timeout_s": 0.3})) as star:
        busy = [await star.begin(f"busy{receiver}", receiver) for receiver in (0, 1)]
        for transfer_id in busy:
            star.sender.push(transfer_id, LAYERS, range(4))
        await star.until_open(2)
        third = await star.begin("third", 2)
        star.sender.push(third, LAYERS, range(4))
        assert await star.end(third) == "too_many_links"
        assert "all 2 links are busy" in star.sent.told[third][0][1]
        for transfer_id in busy:
            assert await star.end(transfer_id) == "acked"
        await star.land("again", 2)  # it was never the peer's fault


class _DeadStream:
    def __init__(self) -> None:
        self.sent: list[pb.SenderMessage] = []

    def send(self, message: pb.SenderMessage) -> None:
        self.sent.append(message)

    async def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        if self.sent:
            raise WorkerLost("connection refused")
        yield pb.ReceiverMessage()

    async def close(self) -> None:
        pass


class _DeadDialer:
    def dial(self, peer: Peer) -> ControlStream:
        return _DeadStream()


async def test_a_peer_that_is_down_is_probed_later_and_later() -> None:
    clock = ManualClock()
    async with Duo(clock=clock) as duo:
        alive = duo.sender._dialer
        duo.sender._dialer = _DeadDialer()
        for attempt, wait_s in enumerate((1.0, 2.0, 4.0)):
            transfer_id = TransferId(f"t{attempt}")
            await duo.sender.offer(transfer_id, RequestId("r"), 8, duo.peer)
            assert await duo.sent.outcome(transfer_id) == "peer_lost"
            with pytest.raises(PeerDown) as down:
                await duo.sender.offer(TransferId("too soon"), RequestId("r"), 8, duo.peer)
            assert (down.value.reason, down.value.retry_after_s) == ("peer_down", wait_s)
            clock.advance(wait_s)
        duo.sender._dialer = alive
        for name in ("probe", "next"):
            transfer_id, kv, target = await duo.begin(name, num_tokens=8)
            duo.sender.push(transfer_id, LAYERS, range(8))
            duo.sender.commit(transfer_id, 1)
            assert await duo.sent.outcome(transfer_id) == "acked"
            assert torch.equal(kv, target)
        assert "too soon" not in duo.sent.told
        assert not duo.sender._health


async def test_a_link_that_does_not_open_counts_and_another_incarnation_begins_anew() -> None:
    clock = ManualClock()
    hubs = MemoryLinks(MemoryHub()), MemoryLinks(MemoryHub())  # they never meet
    config = CONFIG.model_copy(update={"open_timeout_s": 0.2})
    async with Duo(config, clock=clock, links=hubs) as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        duo.sender.push(transfer_id, LAYERS, range(8))
        assert await duo.sent.outcome(transfer_id) == "link_lost"
        with pytest.raises(PeerDown):
            await duo.sender.offer(TransferId("b"), RequestId("b"), 8, duo.peer)
        await duo.sender.offer(TransferId("c"), RequestId("c"), 8, Peer(duo.peer.worker_id, Epoch(8), "in memory"))


async def test_a_rate_cap_holds_messages_back_and_not_the_pool() -> None:
    config = CONFIG.model_copy(update={"rate_limit_bytes_per_s": 1.0, "slot_bytes": 65536, "credit_bytes": 262144})
    async with Duo(config) as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=400)
        duo.sender.push(transfer_id, LAYERS, range(400))
        assert await asyncio.to_thread(duo.source.is_entered.wait, PATIENCE_S)
        await asyncio.wait_for(duo.sender.abort(transfer_id, "enough"), PATIENCE_S)  # it would wait for a day
        sent = duo.sender_metrics.payload_bytes.labels("sender")._value.get()
        assert sent <= 65536  # what the bucket holds at the beginning
        assert duo.source.num_inside == 0


async def test_what_was_held_back_when_its_transfer_was_aborted_is_not_paid_by_the_next() -> None:
    config = CONFIG.model_copy(update={"rate_limit_bytes_per_s": 1.0, "slot_bytes": 65536, "credit_bytes": 262144})
    async with Duo(config) as duo:
        first, _, _ = await duo.begin("a", num_tokens=300)  # two frames, of which the bucket holds one
        duo.sender.push(first, LAYERS, range(300))
        assert await asyncio.to_thread(duo.source.is_entered.wait, PATIENCE_S)
        await asyncio.wait_for(duo.sender.abort(first, "enough"), PATIENCE_S)
        second, kv, target = await duo.begin("b", num_tokens=8)
        duo.sender.push(second, LAYERS, range(8))
        duo.sender.commit(second, 1)
        assert await duo.landed.outcome(second) == "landed"
        assert torch.equal(kv, target)
