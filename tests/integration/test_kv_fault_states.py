"""An abort in every state of either session; and every kind of control message lost, repeated and delayed.

Real senders and receivers in one process. After each fault both owners have been told exactly once, the sessions,
landings and queues are gone, nothing more is written, and the next transfer lands.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import pytest
import torch

from core.clock import ManualClock, MonotonicClock
from core.ids import RequestId, TransferId
from kv_transfer.config import KvTransferConfig
from kv_transfer.ports import Peer
from kv_transfer.receiver.session import ReceiverSession, ReceiveState
from kv_transfer.sender.session import SenderSession, SendState
from protos import kv_transfer_pb2 as pb
from tests.kv_peers import LAYOUT, PATIENCE_S, Duo, WatchedDialer, WatchedStream, hello_of

LAYERS = range(LAYOUT.num_layers)
NUM_TOKENS = 40
T = TransferId("a/0")


class Watch:
    """Lets a test wait for a state: looked at after every event of any session."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed = asyncio.Event()
        self.states: dict[tuple[type, TransferId], set[str]] = {}
        for machine in (SenderSession, ReceiverSession):
            self._spy(monkeypatch, machine)

    def _spy(self, monkeypatch: pytest.MonkeyPatch, machine: type) -> None:
        handle = machine.handle  # type: ignore[attr-defined]

        def watched(session: SenderSession | ReceiverSession, event: object, now: float) -> object:
            effects = handle(session, event, now)
            self.states.setdefault((machine, session.transfer_id), set()).add(session.state)
            self._changed.set()
            return effects

        monkeypatch.setattr(machine, "handle", watched)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.fixture
async def duo(watch: Watch) -> AsyncIterator[Duo]:
    async with Duo(clock=ManualClock()) as duo:
        yield duo


Reach = Callable[[Duo, Watch], Awaitable[None]]


async def _offered(duo: Duo, watch: Watch) -> None:
    """The sender has offered; nobody expects it yet."""
    duo.source.fill(RequestId("a"), NUM_TOKENS)
    duo.target.clear(RequestId("a"), NUM_TOKENS)
    await duo.sender.offer(T, RequestId("a"), NUM_TOKENS, duo.peer)
    await duo.dialer.streams[0].until_heard("hello")
    await duo.dialer.streams[0].until_served()


async def _expected(duo: Duo, watch: Watch) -> None:
    duo.target.clear(RequestId("a"), NUM_TOKENS)
    await duo.receiver.expect(T, RequestId("a"), 0, NUM_TOKENS)


async def _reserved(duo: Duo, watch: Watch) -> None:
    await duo.begin("a", NUM_TOKENS)
    await watch.until(lambda: duo.sender._transfers[T].session.state is SendState.RESERVED)


async def _sending(duo: Duo, watch: Watch) -> None:
    await _reserved(duo, watch)
    duo.sender.push(T, LAYERS, range(16))
    await watch.until(lambda: duo.sender._transfers[T].session.state is SendState.SENDING)
    await watch.until(lambda: duo.receiver._transfers[T].session.state is ReceiveState.SENDING)


async def _committed(duo: Duo, watch: Watch) -> None:
    """The commit is said, and the last part is stuck in the receiver's pool."""
    duo.target.blocked_by = threading.Event()
    await _reserved(duo, watch)
    duo.sender.push(T, LAYERS, range(16))  # as much as slots and credit take while nobody reads
    duo.sender.commit(T, 1)
    assert await asyncio.to_thread(duo.target.is_entered.wait, PATIENCE_S)
    await watch.until(lambda: duo.sender._transfers[T].session.state is SendState.COMMITTED)


async def _acked(duo: Duo, watch: Watch) -> None:
    await _reserved(duo, watch)
    duo.sender.push(T, LAYERS, range(NUM_TOKENS))
    duo.sender.commit(T, 1)
    assert (await duo.sent.outcome(T), await duo.landed.outcome(T)) == ("acked", "landed")


async def _aborted(duo: Duo, watch: Watch) -> None:
    await _sending(duo, watch)
    await duo.receiver.cancel(T, "first")
    await duo.sent.outcome(T)


async def _sender_expired(duo: Duo, watch: Watch) -> None:
    await _offered(duo, watch)
    assert isinstance(duo.clock, ManualClock)
    duo.clock.advance(11)
    duo.sender.tick()
    await duo.sent.outcome(T)


async def _receiver_expired(duo: Duo, watch: Watch) -> None:
    await _expected(duo, watch)
    assert isinstance(duo.clock, ManualClock)
    duo.clock.advance(31)
    duo.receiver.tick()
    await duo.landed.outcome(T)


SENDER_STATES: Mapping[SendState, Reach] = {
    SendState.OFFERED: _offered,
    SendState.RESERVED: _reserved,
    SendState.SENDING: _sending,
    SendState.COMMITTED: _committed,
    SendState.ACKED: _acked,
    SendState.ABORTED: _aborted,
    SendState.EXPIRED: _sender_expired,
}
RECEIVER_STATES: Mapping[ReceiveState, Reach] = {
    ReceiveState.EXPECTED: _expected,
    ReceiveState.OFFERED: _offered,
    ReceiveState.RESERVED: _reserved,
    ReceiveState.SENDING: _sending,
    ReceiveState.LANDED: _acked,  # passed through within one event: an owner can act only before and after it
    ReceiveState.ACKED: _acked,
    ReceiveState.ABORTED: _aborted,
    ReceiveState.EXPIRED: _receiver_expired,
}


def test_every_state_of_both_sessions_is_here() -> None:
    assert set(SENDER_STATES) == set(SendState)
    assert set(RECEIVER_STATES) == set(ReceiveState)


async def _release(duo: Duo) -> None:
    """Let out who is stuck in the pool."""
    if duo.target.blocked_by is not None:
        duo.target.blocked_by.set()
        duo.target.blocked_by = None


async def _nothing_is_left(duo: Duo) -> None:
    """The owners were told once, nothing is held, what comes late is not written, and the next transfer lands."""
    assert all(len(told) == 1 for outcomes in (duo.sent, duo.landed) for told in outcomes.told.values())
    num_writes = len(duo.target.writes)
    duo.sender.push(T, LAYERS, range(16, NUM_TOKENS))  # the engine has not heard of it yet
    duo.sender.commit(T, 1)
    after, kv, target = await duo.begin("after", 8)
    duo.sender.push(after, LAYERS, range(8))
    duo.sender.commit(after, 1)
    assert (await duo.sent.outcome(after), await duo.landed.outcome(after)) == ("acked", "landed")
    assert torch.equal(kv, target)
    assert all(request_id == "after" for request_id, _, _ in duo.target.writes[num_writes:])
    assert duo.source.num_inside == duo.target.num_inside == 0
    assert not duo.sender._transfers
    assert not duo.receiver._transfers


@pytest.mark.parametrize("state", list(SENDER_STATES))
async def test_an_abort_of_the_sender_in_every_state(state: SendState, duo: Duo, watch: Watch) -> None:
    await SENDER_STATES[state](duo, watch)
    assert state in watch.states.get((SenderSession, T), {SendState.OFFERED})
    before = dict(duo.sent.told)
    aborting = asyncio.create_task(duo.sender.abort(T, "the client left"))
    if not state.is_terminal:
        assert await duo.sent.outcome(T) == "cancelled"
    await _release(duo)
    await aborting
    if state.is_terminal:
        assert duo.sent.told == before
    if state is SendState.OFFERED:  # the receiver hears of it, and a reservation that comes now is refused
        await duo.dialer.streams[0].until_served()
    elif state is not SendState.EXPIRED:
        assert await duo.landed.outcome(T) == ("landed" if state is SendState.ACKED else "cancelled")
    await _nothing_is_left(duo)


@pytest.mark.parametrize("state", list(RECEIVER_STATES))
async def test_a_cancel_of_the_receiver_in_every_state(state: ReceiveState, duo: Duo, watch: Watch) -> None:
    await RECEIVER_STATES[state](duo, watch)
    before = dict(duo.landed.told)
    has_ended = T in before
    await duo.receiver.cancel(T, "rejected before admission")
    if has_ended:
        assert duo.landed.told == before
    elif state is not ReceiveState.OFFERED:
        assert await duo.landed.outcome(T) == "cancelled"
    if state in (ReceiveState.EXPECTED, ReceiveState.EXPIRED):
        # The prefill worker offers what was called off: it is told at once and why, long before any lease.
        duo.source.fill(RequestId("a"), NUM_TOKENS)
        await duo.sender.offer(T, RequestId("a"), NUM_TOKENS, duo.peer)
    ended = {ReceiveState.ACKED: "acked", ReceiveState.LANDED: "acked", ReceiveState.EXPIRED: "lease_expired"}
    assert await duo.sent.outcome(T) == ended.get(state, "cancelled")
    await _nothing_is_left(duo)


# --- control messages ------------------------------------------------------------------------------------------------

MAX_TRIES = 5  # each silence costs a short timeout here, which a busy machine may use up by itself


def _config(timeout_s: float) -> KvTransferConfig:
    return KvTransferConfig(
        backend="memory",
        slot_bytes=4096,
        credit_bytes=8192,  # credit has to come back for a transfer to end
        lease_s=timeout_s,
        offer_timeout_s=timeout_s,
        connect_timeout_s=timeout_s,
        open_timeout_s=timeout_s,
        send_timeout_s=timeout_s,
    )


KINDS = ("hello", "offer", "reserved", "open_link", "link_opened", "credit", "commit", "ack")


class SkippingClock(MonotonicClock):
    """The real clock, which can be put forward: past the time for which a peer that failed is left alone."""

    skipped_s = 0.0

    def now(self) -> float:
        return super().now() + self.skipped_s


class BadStream(WatchedStream):
    """Delivers every message of one kind not at all, twice, or behind the next one; the first of its kind only."""

    kind, fault = "", ""

    def send(self, message: pb.SenderMessage) -> None:
        self._deliver(message, super().send, self._late_out)  # type: ignore[arg-type]  # what it delivers it was given

    async def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        put = self.to_sender.put_nowait

        def deliver(message: object) -> None:
            if isinstance(message, pb.ReceiverMessage):
                self._deliver(message, put, self._late_in)  # type: ignore[arg-type]
            else:
                put(message)  # type: ignore[arg-type]

        self.to_sender.put_nowait = deliver  # type: ignore[assignment, method-assign]
        async for message in super().messages():
            yield message

    def __init__(self, duo: Duo) -> None:
        super().__init__(duo.receiver)
        self._late_out: list[object] = []
        self._late_in: list[object] = []
        self.num_struck = 0

    def _deliver(self, message: object, put: Callable[[object], None], late: list[object]) -> None:
        kind = message.WhichOneof("message")  # type: ignore[attr-defined]
        is_struck = kind == self.kind and not self.num_struck
        self.num_struck += is_struck
        if is_struck and self.fault == "delayed":
            late.append(message)
            return
        for _ in range({"lost": 0, "repeated": 2}.get(self.fault, 1) if is_struck else 1):
            put(message)
        while late:
            put(late.pop())


class BadDialer(WatchedDialer):
    def __init__(self, duo: Duo, kind: str, fault: str) -> None:
        super().__init__(duo.receiver)
        self._duo, self._kind, self._fault = duo, kind, fault

    def dial(self, peer: Peer) -> WatchedStream:
        stream = BadStream(self._duo)
        if not self.streams:
            stream.kind, stream.fault = self._kind, self._fault
        self.streams.append(stream)
        return stream


@pytest.mark.parametrize("fault", ["lost", "repeated", "delayed"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_control_message_that_is_lost_repeated_or_delayed(kind: str, fault: str) -> None:
    clock = SkippingClock()
    config = _config(PATIENCE_S if fault == "repeated" and kind != "hello" else 0.4)
    async with Duo(config, clock=clock) as duo:
        dialer = duo.sender._dialer = BadDialer(duo, kind, fault)

        async def transfer(name: str, num_tokens: int) -> tuple[str, str]:
            transfer_id, kv, target = await duo.begin(name, num_tokens)
            duo.sender.push(transfer_id, LAYERS, range(num_tokens))
            duo.sender.commit(transfer_id, 1)
            sent, landed = await duo.sent.outcome(transfer_id), await duo.landed.outcome(transfer_id)
            if landed == "landed":
                assert torch.equal(kv, target)
            else:
                assert sent != "acked"
            return sent, landed

        sent, landed = await transfer("a", NUM_TOKENS)
        first = dialer.streams[0]
        assert isinstance(first, BadStream)
        assert first.num_struck == 1
        if fault == "repeated" and kind != "hello":  # a second hello breaks the protocol; nothing else does
            assert (sent, landed) == ("acked", "landed")
        costs_a_link_only = kind in ("open_link", "link_opened", "credit")
        if fault == "lost" and not costs_a_link_only:
            assert sent != "acked"
        for turn in range(MAX_TRIES):  # the next one may meet what the fault broke
            clock.skipped_s += 61
            if await transfer(f"after-{turn}", 8) == ("acked", "landed"):
                break
        else:
            pytest.fail("nothing lands any more")


# --- a worker that comes back ----------------------------------------------------------------------------------------


async def test_a_sender_that_dials_again_takes_over_from_its_dead_stream() -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", NUM_TOKENS)
        await duo.dialer.streams[0].until_heard("reserved")
        again = WatchedStream(duo.receiver)
        again.send(hello_of())
        async with asyncio.timeout(PATIENCE_S):
            first = await anext(again.messages())
        assert first.WhichOneof("message") == "hello"
        assert await duo.landed.outcome(transfer_id) == "peer_lost"  # its frames died with the stream
        assert await duo.sent.outcome(transfer_id) == "peer_lost"
        await again.close()
