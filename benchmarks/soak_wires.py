"""The soak's bad wires: control streams that lose, repeat and delay messages, and links that damage frames and break.

Both wrap the real thing, whatever it is, and are told apart from it by nobody. The links also keep count of what they
lend out: ends that are open, and slots that an end's owner holds.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping
from random import Random

from benchmarks.soak_faults import Fault, Plan
from benchmarks.soak_pool import Ledger
from core.errors import ServingError, WorkerLost
from core.ids import TransferId
from kv_transfer.control import ControlStream, Dialer
from kv_transfer.frame import HEADER_BYTES, FrameHeader, decode_header, seal
from kv_transfer.link import LinkPlan, Links, ReceiveEnd, SendEnd, Slot
from kv_transfer.ports import Peer
from protos import kv_transfer_pb2 as pb

DELAY_S = 0.02
Message = pb.SenderMessage | pb.ReceiverMessage


class BadDialer:
    """Control streams through which the plans' faults happen."""

    def __init__(self, inner: Dialer, plans: Mapping[TransferId, Plan], ledger: Ledger) -> None:
        self._inner = inner
        self.plans = plans
        self.ledger = ledger
        self.armed: list[Plan] = []  # whose fault hits the next fitting message of a pair
        self.streams: list[BadStream] = []

    def dial(self, peer: Peer) -> ControlStream:
        self.streams = [stream for stream in self.streams if not stream.is_closed]
        stream = BadStream(self._inner.dial(peer), self)
        self.streams.append(stream)
        return stream


class BadStream:
    """The sender's end of a control stream; what comes in suffers like what goes out."""

    def __init__(self, inner: ControlStream, dialer: BadDialer) -> None:
        self._inner = inner
        self._dialer = dialer
        self._inbox: asyncio.Queue[pb.ReceiverMessage | ServingError | None] = asyncio.Queue()
        self._listening: asyncio.Task[None] | None = None
        self.is_closed = False
        self.is_credit_known = True  # no message that carries credit was touched since the link opened

    def send(self, message: pb.SenderMessage) -> None:
        for delay_s in self._fate(message):
            if delay_s:
                asyncio.get_running_loop().call_later(delay_s, self._send_late, message)
            else:
                self._inner.send(message)

    async def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        self._listening = asyncio.create_task(self._listen())
        while (message := await self._inbox.get()) is not None:
            if isinstance(message, ServingError):
                raise WorkerLost(str(message)) from message
            yield message

    async def close(self) -> None:
        self.is_closed = True
        await self._inner.close()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])

    def cut(self) -> None:
        """End the stream as a broken connection would: the sender notices, and closes the rest."""
        self._inbox.put_nowait(WorkerLost("the stream was cut"))

    def _send_late(self, message: pb.SenderMessage) -> None:
        if not self.is_closed:
            self._inner.send(message)

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for message in self._inner.messages():
                fate = self._fate(message)
                kind = message.WhichOneof("message")
                if kind == "link_opened":
                    self.is_credit_known = fate == (0.0,)
                elif kind == "credit" and fate != (0.0,):
                    self.is_credit_known = False
                for delay_s in fate:
                    if delay_s:
                        loop.call_later(delay_s, self._inbox.put_nowait, message)
                    else:
                        self._inbox.put_nowait(message)
            self._inbox.put_nowait(None)
        except ServingError as error:
            self._inbox.put_nowait(error)

    def _fate(self, message: Message) -> tuple[float, ...]:
        """Return after how long the message is delivered, once per time that it is. May be empty: it is lost."""
        kind = message.WhichOneof("message") or ""
        transfer_id = getattr(getattr(message, kind), "transfer_id", None)
        if transfer_id is not None:
            plan = self._dialer.plans.get(TransferId(transfer_id))
            if plan is None or plan.message != kind:
                return (0.0,)
            faults = (Fault.MESSAGE_LOST, Fault.MESSAGE_REPEATED, Fault.MESSAGE_DELAYED)
        else:
            plan = next((armed for armed in self._dialer.armed if armed.message == kind), None)
            if plan is None:
                return (0.0,)
            self._dialer.armed.remove(plan)
            faults = (Fault.PAIR_MESSAGE_LOST, Fault.PAIR_MESSAGE_REPEATED, Fault.PAIR_MESSAGE_DELAYED)
        if not plan.strikes(*faults):
            return (0.0,)
        self._dialer.ledger.injected(f"{plan.fault}: {kind}")
        how = faults.index(plan.fault)
        return ((), (0.0, plan.rng.choice((0.0, DELAY_S))), (DELAY_S,))[how]


class BadLinks:
    """A carrier whose ends spoil frames by plan and count what they lend."""

    def __init__(self, inner: Links, plans: Mapping[TransferId, Plan], ledger: Ledger) -> None:
        self._inner = inner
        self.plans = plans
        self.ledger = ledger
        self.ends: list[_BadSendEnd | _CountedReceiveEnd] = []
        self.has_lied = False  # a frame said another length than it had: if it came late, its credit is gone

    @property
    def backend(self) -> str:
        return self._inner.backend

    def host(self) -> str:
        return self._inner.host()

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        end = _BadSendEnd(self._inner.open_send(address, plan), self)
        self.ends.append(end)
        return end

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        end = _CountedReceiveEnd(self._inner.open_receive(plan))
        self.ends.append(end)
        return end

    def close(self) -> None:
        self._inner.close()

    def open_ends(self) -> "list[_BadSendEnd | _CountedReceiveEnd]":
        self.ends = [end for end in self.ends if not end.is_closed]
        return self.ends

    def cut(self, rng: Random) -> bool:
        """Abort one open end, if there is one."""
        ends = self.open_ends()
        if ends:
            rng.choice(ends).abort()
        return bool(ends)


class _CountedReceiveEnd:
    def __init__(self, inner: ReceiveEnd) -> None:
        self._inner = inner
        self.carrier = inner.carrier
        self.num_lent = 0
        self.is_closed = False

    def receive(self) -> Slot:
        slot = self._inner.receive()
        self.num_lent += 1
        return slot

    def release(self, slot: Slot) -> None:
        self.num_lent -= 1
        self._inner.release(slot)

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()
        self.is_closed = True


class _BadSendEnd:
    def __init__(self, inner: SendEnd, links: BadLinks) -> None:
        self._inner = inner
        self.carrier = inner.carrier
        self._links = links
        self._late: tuple[Slot, int] | None = None
        self.num_lent = 0
        self.is_closed = False

    def acquire(self, timeout_s: float) -> Slot:
        slot = self._inner.acquire(timeout_s)
        self.num_lent += 1
        return slot

    def send(self, slot: Slot, num_bytes: int) -> None:
        self.num_lent -= 1
        message = slot.view()
        header = decode_header(message[:HEADER_BYTES], len(message) - HEADER_BYTES)
        plan = self._links.plans.get(header.transfer_id)
        late, self._late = self._late, None
        if plan is not None and (plan.rng.random() < 0.5 or header.frame_idx >= 2):
            if plan.strikes(Fault.FRAME_REORDERED):
                self._links.ledger.injected(plan.fault)
                self._late = (slot, num_bytes)
            elif plan.strikes(Fault.FRAME_REPEATED):
                self._repeat(slot, num_bytes)
                self._links.ledger.injected(plan.fault)
            elif plan.strikes(*SPOILING):
                SPOILING[plan.fault](message, header, plan.rng)
                self._links.has_lied |= plan.fault is Fault.HEADER_LIES
                self._links.ledger.injected(plan.fault)
        if self._late is None:
            self._inner.send(slot, num_bytes)
        if late is not None:
            self._inner.send(*late)

    def flush(self, timeout_s: float) -> None:
        if self._late is not None:
            late, self._late = self._late, None
            self._inner.send(*late)
        self._inner.flush(timeout_s)

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()
        self.is_closed = True

    def _repeat(self, slot: Slot, num_bytes: int) -> None:
        copy = self._inner.acquire(1.0)
        copy.memory[:num_bytes] = slot.memory[:num_bytes]
        self._inner.send(copy, num_bytes)


def _damage_payload(message: memoryview, header: FrameHeader, rng: Random) -> None:
    message[HEADER_BYTES + rng.randrange(max(1, header.payload_bytes))] ^= 1 << rng.randrange(8)


def _damage_header(message: memoryview, header: FrameHeader, rng: Random) -> None:
    message[rng.randrange(90)] ^= 1 << rng.randrange(8)


def _make_noise(message: memoryview, header: FrameHeader, rng: Random) -> None:
    message[:HEADER_BYTES] = rng.randbytes(HEADER_BYTES)


def _lie(message: memoryview, header: FrameHeader, rng: Random) -> None:
    """Seal a header that is not true of this frame; only such lies as nobody could believe."""
    box = header.box
    tokens = range(box.tokens.start + 1000, box.tokens.stop + 1000)
    lies: tuple[dict[str, object], ...] = (
        {"sender_epoch": header.sender_epoch + 1},
        {"receiver_epoch": header.receiver_epoch + 1},
        {"link_epoch": header.link_epoch + 1},
        {"codec_id": 200},
        {"section_bytes": (10**15,)},
        {"section_bytes": ()},
        {"raw_bytes": header.raw_bytes + 1},
        {"head_dim": header.head_dim * 2, "raw_bytes": header.raw_bytes * 2},
        {"box": dataclasses.replace(box, tokens=tokens)},
        {"box": dataclasses.replace(box, tokens=range(box.tokens.stop, box.tokens.start))},
        {"box": dataclasses.replace(box, heads=range(box.heads.start + 9, box.heads.stop + 9))},
        {"box": dataclasses.replace(box, layers=range(box.layers.start + 99, box.layers.stop + 99))},
    )
    lying = dataclasses.replace(header, **rng.choice(lies))  # type: ignore[arg-type]  # values of every field's type
    seal(lying, message)


SPOILING = {
    Fault.PAYLOAD_DAMAGED: _damage_payload,
    Fault.HEADER_DAMAGED: _damage_header,
    Fault.HEADER_LIES: _lie,
    Fault.NOISE: _make_noise,
}
