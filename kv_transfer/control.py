"""The control plane's ports: streams of `protos/kv_transfer.proto` messages, without saying what carries them.

`rpc` carries them over gRPC, `memory_control` within one process; tests wrap both in wires that drop, repeat and delay.
"""

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from core.ids import TransferId
from kv_transfer.ports import Peer
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb


class ControlStream(Protocol):
    """The sender's end of one control stream."""

    def send(self, message: pb.SenderMessage) -> None:
        """Queue a message; in order, never blocks. Dropped when the stream is lost."""
        ...

    def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        """Yield what the receiver says until the stream ends.

        Raises:
            ServingError: how it ended, if not by `close`.
        """
        ...

    async def close(self) -> None:
        """End the stream and free what carries it."""
        ...


class Dialer(Protocol):
    """Where control streams come from."""

    def dial(self, peer: Peer) -> ControlStream:
        """Return a stream that connects when it is used. Does not block; an absent peer shows in `messages`."""
        ...


ControlReply = Callable[[pb.ReceiverMessage], None]
"""How the receiver answers on one control stream: queues, in order, never blocks; dropped when the stream is lost."""


def nack_reason(text: str) -> NackReason:
    """Read a reason off the wire; one that this build does not know is the peer's own business: PROTOCOL. Pure."""
    try:
        return NackReason(text)
    except ValueError:
        return NackReason.PROTOCOL


def nack(transfer_id: TransferId, reason: NackReason, detail: str) -> pb.ReceiverMessage:
    """Build a Nack. Pure."""
    return pb.ReceiverMessage(nack=pb.Nack(transfer_id=transfer_id, reason=reason, detail=detail[:500]))
