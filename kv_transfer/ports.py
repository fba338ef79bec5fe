"""What the workers plug into KV transfer (reader, writer, outcomes) and what they hand over (peer, statistics).

Canonical KV of a box of (layers a..b, heads h0..h1, tokens t0..t1): a contiguous tensor ``[layers, 2, K, T, D]`` of
the layout's dtype; index 0 of the second axis is K, index 1 is V. Ranges are global: layer, head and token numbers of
the model and of the prompt, never of a shard or of a block.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from core.errors import TransferError
from core.ids import Epoch, RequestId, TransferId, WorkerId
from kv_transfer.session import NackReason


@dataclass(frozen=True, slots=True)
class Peer:
    """The decode worker to send to: which incarnation, and where its gRPC server listens (host:port)."""

    worker_id: WorkerId
    epoch: Epoch
    address: str


class PeerDown(TransferError):
    """The decode worker could not be reached a moment ago; it is tried again after `retry_after_s`, not before."""

    def __init__(self, worker_id: str, retry_after_s: float) -> None:
        super().__init__(NackReason.PEER_DOWN, f"{worker_id} is tried again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class LandedStats:
    """What a landed transfer brought.

    Attributes:
        num_frames, raw_bytes: frames written, and their KV bytes before coding.
        wire_bytes: what crossed the link for them: coded, with metadata and headers.
        profile: as the sender names it; for people.
        profile_is_lossless: every frame was one that decodes to equal bits; read off the frames, not believed.
        held_tokens: prefix that was not sent because this side had it.
        dropped_tokens: prompt tokens past it that the profile left out; the KV of the others is in the first places.
        transfer_s: offer to landed.
        exposed_s: prefill end (as the sender says it with its commit) to landed: the part that nothing hid.
    """

    num_frames: int
    raw_bytes: int
    held_tokens: int
    transfer_s: float
    exposed_s: float
    wire_bytes: int = 0
    profile: str = "none"
    profile_is_lossless: bool = True
    dropped_tokens: int = 0


class KvReader(Protocol):
    """The prefill side's pool. Called on sender and codec threads, several at once, while the engine computes."""

    def read_kv(
        self,
        request_id: RequestId,
        layers: range,
        tokens: range,
        out: Tensor | None = None,
        heads: range | None = None,
    ) -> Tensor:
        """Return the canonical KV of a box that was pushed before.

        Args:
            request_id: of a request whose blocks are pinned.
            layers, tokens: global ranges, step 1, not empty.
            out: where to gather: contiguous, of the canonical shape and dtype; then it is also what is returned.
            heads: global range; None: all heads that this side has.

        Raises:
            ServingError: the blocks are gone. The transfer fails; nothing of it is used by the peer.
        """
        ...


class TokenReader(Protocol):
    """What the prefill side's pool can do besides, so that tokens can be left out. Called as `KvReader`."""

    def score_tokens(self, request_id: RequestId) -> Tensor | None:
        """Return float [num_tokens] of a prompt that is computed: the larger, the more a token matters.

        None: there are no scores, or the model needs every token; then all are sent.

        Raises:
            ServingError: the blocks are gone.
        """
        ...

    def read_tokens(self, request_id: RequestId, layers: range, tokens: Tensor, heads: range) -> Tensor:
        """Return the canonical KV of some tokens: int64 [T], positions in the prompt, ascending.

        Raises:
            ServingError: the blocks are gone.
        """
        ...


class KvWriter(Protocol):
    """The decode side's pool. Called on receiver and codec threads, several at once, while the engine computes."""

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: Tensor, heads: range | None = None
    ) -> None:
        """Copy the canonical KV of a box into blocks that were reserved before. `kv` is only lent for the call.

        Args:
            heads: global range; None: all heads that this side has.

        Raises:
            ServingError: the reservation is gone, or the box is outside of it. The transfer fails.
        """
        ...


class SenderOutcomes(Protocol):
    """Called on the event loop, exactly one of the two per accepted offer. Must not block.

    When either is called, no `read_kv` of the transfer is in progress and none will be made: the lease may end.
    """

    def on_acked(self, transfer_id: TransferId) -> None:
        """The decode worker has all of it, verified and written."""
        ...

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        """It will not arrive. `reason` is a `kv_transfer.session.NackReason` value."""
        ...


class ReceiverOutcomes(Protocol):
    """Called on the event loop, exactly one of the two per expected transfer. Must not block.

    When either is called, no `write_kv` of the transfer is in progress and none will come: blocks may be freed.
    """

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        """Every (layer, head, token) of the reservation was verified and written exactly once."""
        ...

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        """It will not be complete. `reason` is a `kv_transfer.session.NackReason` value."""
        ...
