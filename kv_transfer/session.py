"""Words of a KV transfer's session that both sides share: reasons to refuse or to end one.

A session is one attempt to bring the KV of one request from a prefill worker (sender) to a decode worker (receiver).
The machines are `sender.session` and `receiver.session`; they meet only through the messages of
`protos/kv_transfer.proto` and the frames of the link.
"""

from enum import StrEnum

from core.errors import TRANSFER_CANCELLED


class NackReason(StrEnum):
    """Why a transfer ended without an ACK. The value crosses the wire and labels the failure metrics."""

    # what a frame can be guilty of
    MALFORMED = "malformed"  # not a frame, or a header that contradicts itself
    VERSION = "version"  # a frame version that this side does not speak
    CHECKSUM = "checksum"
    SHAPE = "shape"  # heads, head_dim, dtype or layers are not the layout's
    EPOCH = "epoch"  # written by, or for, another incarnation or another link
    LENGTH = "length"  # sections do not add up, or the frames do not add up to the transfer
    CODEC = "codec"  # unknown codec, or parameters that it refuses
    RANGE = "range"  # outside of what was reserved
    DUPLICATE = "duplicate"  # a part that has already been written
    # what a session can end with
    UNKNOWN_TRANSFER = "unknown_transfer"
    LAYOUT = "layout"  # the sender's tokens have another size
    LEASE_EXPIRED = "lease_expired"
    LINK_LOST = "link_lost"
    PEER_LOST = "peer_lost"  # the control stream ended
    PEER_DOWN = "peer_down"  # it could not be reached a moment ago, and is not tried again yet
    TOO_MANY_LINKS = "too_many_links"  # every link that this side may keep open is busy
    RECEIVER_FULL = "receiver_full"
    CANCELLED = TRANSFER_CANCELLED  # by the owner on either side
    POOL = "pool"  # reading from, or writing into, the KV pool was refused
    PROTOCOL = "protocol"  # the peer said what it may not say now
    CLOSED = "closed"  # this side is shutting down
