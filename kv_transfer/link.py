"""The link port: how messages of KV bytes get from one process to another. Implementations differ in the carrier only.

A link is one direction, one pair of workers, one epoch. Each end is owned by ONE thread; only `abort` may be called
from others. Messages arrive in order. Both ends hold `num_slots` staging slots; the sender fills a slot and sends it
while the next one is filled, the receiver works in the slot that the message landed in. Nothing is ever repaired: any
failure or timeout breaks the link for both ends, and the pair meets again under the next epoch.

Who calls what: the receiver of a pair calls `Links.host` once and says the address on the control stream; for every
link epoch then both ends are opened, each on its own thread, and meet under the same name.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from core.errors import TransferError
from kv_transfer.session import NackReason


class LinkError(TransferError):
    """The link broke, or could not be opened. Both ends must be closed."""

    def __init__(self, detail: str) -> None:
        super().__init__(NackReason.LINK_LOST, detail)
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Slot:
    """A staging buffer: `memory` is uint8 in host memory, 64-byte aligned, of the link's slot size."""

    index: int
    memory: Tensor

    def view(self) -> memoryview:
        """Return the same memory as bytes."""
        return memoryview(self.memory.numpy())  # type: ignore[arg-type]  # arrays are buffers, also before Python 3.12


@dataclass(frozen=True, slots=True)
class PairIdentity:
    """Which incarnations the two ends are: names their links and stamps their frames."""

    sender_id: str
    sender_epoch: int
    receiver_id: str
    receiver_epoch: int

    def link_name(self, link_epoch: int) -> str:
        return f"kv/{self.sender_id}@{self.sender_epoch}/{self.receiver_id}@{self.receiver_epoch}/{link_epoch}"


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """What both ends agree on before they meet.

    Attributes:
        name: unique per pair, incarnations and epoch; never used twice.
        slot_bytes: largest message; the receiver posts buffers of this size, the sender enforces it.
        open_timeout_s: how long one end waits for the other to come.
        send_timeout_s: for how long nothing may move while a message is on its way; then the link is broken.
    """

    name: str
    slot_bytes: int
    num_slots: int
    open_timeout_s: float
    send_timeout_s: float = 10.0


class SendEnd(Protocol):
    """The end that speaks."""

    @property
    def carrier(self) -> str:
        """What the bytes go over: shm, tcp, gloo, nccl or memory."""
        ...

    def acquire(self, timeout_s: float) -> Slot:
        """Return a slot whose previous message has left, waiting for it if need be.

        Raises:
            LinkError: broken, aborted, or nothing left within the timeout (the link is broken then).
        """
        ...

    def send(self, slot: Slot, num_bytes: int) -> None:
        """Start to send the first `num_bytes` of an acquired slot. The slot belongs to the link again.

        Returns when the carrier has taken it over; that may take as long as the wire is slow.

        Raises:
            LinkError: broken, or nothing moved for the plan's `send_timeout_s`.
        """
        ...

    def flush(self, timeout_s: float) -> None:
        """Wait until everything sent has left; carriers that are told what was released wait for that.

        Raises:
            LinkError: as `acquire`.
        """
        ...

    def abort(self) -> None:
        """Break the link; unblocks the owner. Any thread, any number of times."""
        ...

    def close(self) -> None:
        """Free everything. Owner only; last."""
        ...


class ReceiveEnd(Protocol):
    """The end that listens."""

    @property
    def carrier(self) -> str:
        """As the sender's."""
        ...

    def receive(self) -> Slot:
        """Wait for the next message, without limit: an idle link is healthy. `abort` unblocks.

        Returns:
            The slot that it landed in. Its length is not known to the link; the frame says it, and is not believed.

        Raises:
            LinkError: broken or aborted.
        """
        ...

    def release(self, slot: Slot) -> None:
        """Offer a received slot for another message.

        Raises:
            LinkError: broken.
        """
        ...

    def abort(self) -> None:
        """Break the link; unblocks the owner. Any thread, any number of times."""
        ...

    def close(self) -> None:
        """Free everything. Owner only; last."""
        ...


class Links(Protocol):
    """A carrier: where links come from. One per sender and one per receiver."""

    @property
    def backend(self) -> str:
        """Both sides of a pair must name the same."""
        ...

    def host(self) -> str:
        """Receiver: begin to host what ends meet at, and return its address. Idempotent."""
        ...

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        """Meet the other end; blocks.

        Raises:
            LinkError: the other end did not come in time.
        """
        ...

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        """Meet the other end; blocks. After `host`.

        Raises:
            LinkError: the other end did not come in time.
        """
        ...

    def close(self) -> None:
        """Stop hosting. Links that are open stay open."""
        ...
