"""The faults of the soak: what may happen to one transfer, drawn from a seed, and the wires that make it happen.

A `Plan` is all that is random about one transfer. Faults of owners, pools and encoders are the driver's to commit;
those of messages and frames happen here, in wrappers around any dialer and any carrier, which know whose plan to follow
from the transfer id in what passes by. Messages that belong to a pair and not to a transfer are hit when a plan has
armed that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

from core.ids import RequestId, TransferId
from core.layout import KvLayout


class Fault(StrEnum):
    NONE = "none"
    # owners
    SENDER_ABORTS = "sender aborts"
    RECEIVER_CANCELS = "receiver cancels"
    BOTH_GIVE_UP = "both give up"
    NEVER_OFFERED = "never offered"
    NEVER_EXPECTED = "never expected"
    OTHER_LENGTH = "offer and reservation differ"
    HOLE = "commit with a hole"
    PUSHED_TWICE = "part pushed twice"
    # pools and encoders
    SOURCE_FAILS = "source pool fails"
    TARGET_FAILS = "target pool fails"
    POOLS_ARE_SLOW = "pools are slow"
    ENCODER_RAISES = "encoder raises"
    ENCODER_LIES = "encoder lies"
    # frames and links
    PAYLOAD_DAMAGED = "payload damaged"
    HEADER_DAMAGED = "header damaged"
    HEADER_LIES = "header lies"
    NOISE = "noise instead of a frame"
    FRAME_REPEATED = "frame repeated"
    FRAME_REORDERED = "frame reordered"
    LINK_CUT_BY_SENDER = "link cut at the sender"
    LINK_CUT_BY_RECEIVER = "link cut at the receiver"
    # control messages
    MESSAGE_LOST = "message lost"
    MESSAGE_REPEATED = "message repeated"
    MESSAGE_DELAYED = "message delayed"
    PAIR_MESSAGE_LOST = "pair message lost"
    PAIR_MESSAGE_REPEATED = "pair message repeated"
    PAIR_MESSAGE_DELAYED = "pair message delayed"
    STREAM_CUT = "control stream cut"
    # lives
    RECEIVER_RESTARTS = "receiver restarts"
    SENDER_RESTARTS = "sender restarts"


_COMMON, _SOME, _RARE = 10.0, 3.0, 0.6
WEIGHTS: Mapping[Fault, float] = {
    Fault.SENDER_ABORTS: _COMMON,
    Fault.RECEIVER_CANCELS: _COMMON,
    Fault.BOTH_GIVE_UP: _SOME,
    Fault.NEVER_OFFERED: _SOME,
    Fault.NEVER_EXPECTED: _SOME,
    Fault.OTHER_LENGTH: _SOME,
    Fault.HOLE: _SOME,
    Fault.PUSHED_TWICE: _SOME,
    Fault.SOURCE_FAILS: _SOME,
    Fault.TARGET_FAILS: _SOME,
    Fault.POOLS_ARE_SLOW: _SOME,
    Fault.ENCODER_RAISES: _SOME,
    Fault.ENCODER_LIES: _SOME,
    Fault.PAYLOAD_DAMAGED: _COMMON,
    Fault.HEADER_DAMAGED: _SOME,
    Fault.HEADER_LIES: _SOME,
    Fault.FRAME_REPEATED: _SOME,
    Fault.FRAME_REORDERED: _SOME,
    Fault.MESSAGE_LOST: _SOME,
    Fault.MESSAGE_REPEATED: _COMMON,
    Fault.MESSAGE_DELAYED: _COMMON,
    # these cost every transfer of their pair
    Fault.NOISE: _RARE,
    Fault.LINK_CUT_BY_SENDER: _RARE,
    Fault.LINK_CUT_BY_RECEIVER: _RARE,
    Fault.PAIR_MESSAGE_LOST: _RARE,
    Fault.PAIR_MESSAGE_REPEATED: _RARE,
    Fault.PAIR_MESSAGE_DELAYED: _RARE,
    Fault.STREAM_CUT: _RARE,
    Fault.RECEIVER_RESTARTS: _RARE,
    Fault.SENDER_RESTARTS: _RARE,
}
TRANSFER_MESSAGES = ("offer", "commit", "abort", "reserved", "ack", "nack")
PAIR_MESSAGES = ("hello", "open_link", "link_opened", "link_lost", "credit", "renew")
MAX_TOKENS = 96


@dataclass(slots=True)
class Plan:
    """One transfer: its shape, its profile, its fault and when that strikes.

    Attributes:
        parts: what is pushed, in order.
        profile: a name, "none" for raw.
        fault_at: of the steps [offer, parts.., commit], the one before which the fault strikes.
        message: kind of control message that a fault of messages hits.
        rng: for what is drawn later; its own, so that one transfer's draws do not depend on another's.
    """

    index: int
    num_tokens: int
    held_tokens: int
    parts: list[tuple[range, range]]
    is_offered_first: bool
    profile: str
    fault: Fault
    fault_at: int
    message: str
    rng: Random
    is_spent: bool = False
    num_frames: int = field(default=0)

    @property
    def transfer_id(self) -> TransferId:
        return TransferId(f"soak-{self.index}/0")

    @property
    def request_id(self) -> RequestId:
        return RequestId(f"soak-{self.index}")

    def strikes(self, *faults: Fault) -> bool:
        """Return whether the plan has one of these faults and it has not struck; then it has."""
        if self.is_spent or self.fault not in faults:
            return False
        self.is_spent = True
        return True


def draw(seed: int, index: int, layout: KvLayout, profiles: tuple[str, ...], fault_ratio: float) -> Plan:
    """Return the plan of one transfer. Pure."""
    rng = Random(f"{seed}/{index}")
    num_tokens = rng.choice((rng.randint(1, 8), rng.randint(1, MAX_TOKENS)))
    held_tokens = rng.choice((0, 0, rng.randint(0, num_tokens)))
    chunk, group = rng.randint(1, num_tokens), rng.choice((1, 2, layout.num_layers))
    parts = [
        (range(layer, min(layer + group, layout.num_layers)), range(start, min(start + chunk, num_tokens)))
        for start in range(0, num_tokens, chunk)
        for layer in range(0, layout.num_layers, group)
    ]
    fault = Fault.NONE
    if rng.random() < fault_ratio:
        fault = rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
    is_pair_fault = fault in (Fault.PAIR_MESSAGE_LOST, Fault.PAIR_MESSAGE_REPEATED, Fault.PAIR_MESSAGE_DELAYED)
    return Plan(
        index=index,
        num_tokens=num_tokens,
        held_tokens=held_tokens,
        parts=parts,
        is_offered_first=rng.random() < 0.3,
        profile=rng.choice(profiles),
        fault=fault,
        fault_at=rng.randint(0, len(parts) + 1),
        message=rng.choice(PAIR_MESSAGES if is_pair_fault else TRANSFER_MESSAGES),
        rng=rng,
    )
