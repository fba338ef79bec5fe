"""Peers that lie on the control stream: stream or transfer ends with a reason, and nothing grows without end."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from core.clock import MonotonicClock
from core.errors import ProtocolError
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.membership import WorkerIdentity
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import FRAME_VERSION
from kv_transfer.link import LinkError, LinkPlan, ReceiveEnd, SendEnd
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import Peer
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.sender.sender import KvSender
from protos import kv_transfer_pb2 as pb
from tests.kv_peers import LAYOUT, PATIENCE_S, ArrayPool, Outcomes, hello_of

T, R = TransferId("a/0"), RequestId("a")
NUM_TOKENS = 12
CONFIG = KvTransferConfig(backend="tcp", slot_bytes=4096, credit_bytes=16384, open_timeout_s=0.3)


class NoLinks:
    """Links that remember what they were to open, and never do."""

    backend = "tcp"

    def __init__(self) -> None:
        self.plans: list[LinkPlan] = []

    def host(self) -> str:
        return ""

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        self.plans.append(plan)
        raise LinkError("not here")

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        raise LinkError("not here")

    def close(self) -> None:
        pass


class LyingReceiver:
    """Dialer and stream: says hello, and then a line of its own to each kind of message that it has one for."""

    def __init__(self, lines: dict[str, pb.ReceiverMessage]) -> None:
        self._lines = lines
        self._said: asyncio.Queue[pb.ReceiverMessage | None] = asyncio.Queue()

    def dial(self, peer: Peer) -> "LyingReceiver":
        return self

    def send(self, message: pb.SenderMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "hello":
            hello = pb.ReceiverHello(worker_id="decode", epoch=7, frame_version=FRAME_VERSION)
            self._said.put_nowait(pb.ReceiverMessage(hello=hello))
        elif kind in self._lines:
            self._said.put_nowait(self._lines[kind])

    async def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        while (message := await self._said.get()) is not None:
            yield message

    async def close(self) -> None:
        self._said.put_nowait(None)


async def offer_to(liar: LyingReceiver, links: NoLinks) -> tuple[str, str]:
    """Offer a transfer; return its outcome with the detail."""
    pool = ArrayPool()
    outcomes = Outcomes(pool)
    sender = KvSender(
        CONFIG,
        WorkerIdentity(WorkerId("prefill"), Epoch(3), "test"),
        LAYOUT,
        pool,
        outcomes,
        MonotonicClock(),
        links=links,
        dialer=liar,
        metrics=KvTransferMetrics(CollectorRegistry()),
    )
    pool.fill(R, NUM_TOKENS)
    await sender.offer(T, R, NUM_TOKENS, Peer(WorkerId("decode"), Epoch(7), "nowhere"))
    sender.push(T, range(LAYOUT.num_layers), range(NUM_TOKENS))
    try:
        await outcomes.outcome(T)
    finally:
        await sender.close()
    return outcomes.told[T][0]


def _reserved(lease_s: float) -> pb.ReceiverMessage:
    return pb.ReceiverMessage(reserved=pb.Reserved(transfer_id=T, held_tokens=0, lease_s=lease_s))


@pytest.mark.parametrize("said", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("kind", ["reserved", "ack"])
async def test_a_receiver_that_says_no_seconds_breaks_its_stream(kind: str, said: float) -> None:
    lie = _reserved(said) if kind == "reserved" else pb.ReceiverMessage(ack=pb.Ack(transfer_id=T, exposed_s=said))
    outcome, detail = await offer_to(LyingReceiver({"offer": lie}), NoLinks())
    assert outcome == "peer_lost"
    assert "seconds" in detail


@pytest.mark.parametrize("slot_bytes", [0, 1024, 1 << 40, 2**64 - 1])
async def test_a_receiver_that_names_absurd_slots_is_not_opened_to(slot_bytes: int) -> None:
    links = NoLinks()
    opened = pb.LinkOpened(link_epoch=1, rendezvous="", slot_bytes=slot_bytes, backend="tcp")
    lines = {"offer": _reserved(30.0), "open_link": pb.ReceiverMessage(link_opened=opened)}
    outcome, detail = await offer_to(LyingReceiver(lines), links)
    assert outcome == "link_lost"
    assert not links.plans
    assert f"slots of {slot_bytes}" in detail


async def test_a_sender_that_opens_links_without_end_does_not_fill_the_receiver_with_threads() -> None:
    pool = ArrayPool()
    receiver = KvReceiver(
        CONFIG,
        WorkerIdentity(WorkerId("decode"), Epoch(7), "test"),
        LAYOUT,
        pool,
        Outcomes(pool),
        MonotonicClock(),
        metrics=KvTransferMetrics(CollectorRegistry()),
    )
    most = 0

    async def flood() -> AsyncIterator[pb.SenderMessage]:
        nonlocal most
        yield hello_of()
        for link_epoch in range(1, 400):
            yield pb.SenderMessage(open_link=pb.OpenLink(link_epoch=link_epoch))
            most = max(most, sum(thread.name.startswith("kv-receive") for thread in threading.enumerate()))

    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ProtocolError, match="faster than they close"):
            await receiver.serve(flood(), lambda message: None)
        await receiver.close()
    assert most < 100
