"""The question which profile a transfer should use, its answer, and what came of it: the port of the controller.

Who calls what: the sender asks once per transfer, when the receiver has reserved (then the tokens to send and the link
are known), and reports once, when the transfer is acknowledged or has failed. Both on the event loop; neither blocks.
"""

from dataclasses import dataclass
from typing import Protocol

from core.ids import RequestId, TransferId, WorkerId
from core.kv_quality import EXACT
from kv_transfer.codec import RAW, Encoder
from kv_transfer.token_selection import TokenSelection


@dataclass(frozen=True, slots=True)
class TransferTerms:
    """What the request asks of its transfer; known when it is offered.

    Attributes:
        quality_floor: least token agreement (lower confidence bound) of the profile, in [0, 1]; 1 means lossless.
        budget_s: how long the hand-off may last after the prefill; None: as short as possible.
        tenant: for accounting.
        compute_s: estimated time from now until the prefill has computed the last part; 0 when it has.
    """

    quality_floor: float = EXACT
    budget_s: float | None = None
    tenant: str = ""
    compute_s: float = 0.0


NO_TERMS = TransferTerms()


@dataclass(frozen=True, slots=True)
class LinkView:
    """One link as it is measured, at the moment of the question.

    Attributes:
        carrier: shm, tcp, gloo, nccl, memory.
        goodput_bytes_per_s: payload bytes on the wire per second; None while nothing was measured.
        rtt_s: of a small message; None while nothing was measured.
        queued_bytes: payload bytes (as coded, estimated) of other transfers that are ahead in this pair's queue or in
            flight.
    """

    carrier: str
    goodput_bytes_per_s: float | None
    rtt_s: float | None
    queued_bytes: int


@dataclass(frozen=True, slots=True)
class TransferQuestion:
    """What the controller decides on."""

    transfer_id: TransferId
    request_id: RequestId
    peer: WorkerId
    raw_bytes: int
    num_tokens: int
    terms: TransferTerms
    link: LinkView


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer.

    Attributes:
        profile: its name; "none" is raw.
        predicted_s: reserved to acknowledged; None when nothing is known yet.
        reason: of `controller` enumerations; for metrics and people.
        selection: which tokens are handed over; None: all.
    """

    profile: str
    encoder: Encoder
    predicted_s: float | None
    reason: str
    selection: TokenSelection | None = None


@dataclass(frozen=True, slots=True)
class TransferObservation:
    """What came of it.

    Attributes:
        observed_s: reserved to acknowledged, on the sender's clock.
        exposed_s: the owner's commit (the prefill is done, parts may still be queued) to acknowledged, on the sender's
            clock; None when it failed before the commit.
        payload_bytes: as coded, on the wire.
        failure: a NackReason, or "" when it was acknowledged.
        goodput_bytes_per_s: of the link as it is measured by now, this transfer included; None: not known.
    """

    transfer_id: TransferId
    observed_s: float
    exposed_s: float | None
    raw_bytes: int
    payload_bytes: int
    failure: str = ""
    goodput_bytes_per_s: float | None = None


class ProfileChooser(Protocol):
    """Implemented by the controller, by one static profile, and by `AlwaysRaw`."""

    def choose(self, question: TransferQuestion) -> Choice:
        """Return the profile for a transfer. Takes well under a millisecond."""
        ...

    def observe(self, observation: TransferObservation) -> None:
        """Learn from a transfer that `choose` was asked about; called exactly once for each, also for failures."""
        ...


class AlwaysRaw:
    """No profiles: every transfer goes as it is."""

    def choose(self, question: TransferQuestion) -> Choice:
        return Choice("none", RAW, None, "no_profiles")

    def observe(self, observation: TransferObservation) -> None:
        pass
