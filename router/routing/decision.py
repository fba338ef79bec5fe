"""What a policy answers: a placement with its terms and predictions, or who is missing. Frozen."""

import struct
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from core.ids import WorkerId
from core.membership import Role
from router.routing.columns import CANDIDATE, TERM_NAMES, ModeCode
from router.routing.modes import Binding, Mode, ModeReason

_ROW = struct.Struct("".join("d" if CANDIDATE[name] == np.float64 else "q" for name in CANDIDATE.names or ()))
assert _ROW.size == CANDIDATE.itemsize

_MODES = {
    ModeCode.REMOTE_PREFILL: Mode.REMOTE_PREFILL,
    ModeCode.LOCAL_PREFILL: Mode.LOCAL_PREFILL,
    ModeCode.COLOCATED: Mode.COLOCATED,
}


class PickReason(StrEnum):
    """Why the winner won."""

    ONLY = "only_candidate"
    PREFIX = "prefix_hit"  # cheapest, and it holds more of the prompt than any other candidate
    CHEAPEST = "cheapest"
    TIE = "tie"  # as cheap as another; drawn
    SAMPLED = "sampled"  # drawn by temperature, and not the cheapest
    BASELINE = "baseline"  # by a policy that knows no cost


class Obstacle(StrEnum):
    """Why a worker of the wanted role is no candidate; also why there is none at all (then the mildest of them)."""

    TOO_LONG = "too_long"  # its context is shorter than the request may become
    REFUSED = "refused"  # it said no in this round
    LAYOUT = "layout"  # no partner has its KV layout
    NOT_LIVE = "not_live"  # not ready, or no stream to this incarnation
    MODE = "mode"  # the modes that are allowed leave nobody
    ABSENT = "absent"  # no such worker is known


@dataclass(frozen=True, slots=True)
class CostTerms:
    """Seconds, each finite and at least 0; what they are is told in `router.routing.prices` and `search`."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    crowding_s: float = 0.0
    host_tier_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    slo_s: float = 0.0
    affinity_s: float = 0.0
    handicap_s: float = 0.0

    @property
    def total_s(self) -> float:
        return (
            self.queue_s + self.prefill_s + self.crowding_s + self.host_tier_s + self.transfer_s
            + self.decode_s + self.slo_s + self.affinity_s + self.handicap_s
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement and what it is expected to cost.

    Attributes:
        prefill, decode: in `Mode.REMOTE_PREFILL` both; else the one that does it all, by its role.
        ttft_s: predicted, from arrival.
        tpot_s: predicted seconds per decode step; 0 when nothing is to decode.
        transfer_total_s: of the KV, hidden part included.
        room_s: wait for blocks where it decodes, counted in `decode_s`.
        ready_in_s: from now to the first token, of which `compute_s` are not waiting.
        uncached_tokens, held_tokens: of the prompt, on the worker that computes it.
        decode_held_tokens: of the prompt, on the worker that decodes.
    """

    mode: Mode
    prefill: WorkerId | None
    decode: WorkerId | None
    terms: CostTerms
    ttft_s: float
    tpot_s: float
    transfer_total_s: float
    room_s: float
    ready_in_s: float
    compute_s: float
    uncached_tokens: int
    held_tokens: int
    decode_held_tokens: int


@dataclass(frozen=True, slots=True)
class CandidateList:
    """Candidates as the search left them, read when somebody asks: the bytes of an array (`columns.CANDIDATE`), and the
    names of its slots."""

    data: bytes
    names: dict[int, WorkerId]

    def __len__(self) -> int:
        return len(self.data) // _ROW.size

    @property
    def num_bytes(self) -> int:
        return len(self.data) + 100 * len(self.names)

    def at(self, position: int) -> Candidate:
        values = _ROW.unpack_from(self.data, position * _ROW.size)
        num_terms = len(TERM_NAMES)
        ttft_s, tpot_s, whole_s, room_s, ready_s, compute_s, uncached, held, decode_held, mode, prefill, decode = (
            values[num_terms + 1 :]
        )
        return Candidate(
            _MODES[mode],
            self.names.get(prefill),
            self.names.get(decode),
            CostTerms(*values[1 : num_terms + 1]),
            ttft_s,
            tpot_s,
            whole_s,
            room_s,
            ready_s,
            compute_s,
            int(uncached),
            int(held),
            int(decode_held),
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """A placement with everything it was weighed against.

    Attributes:
        winner: what it is expected to cost. With `Binding.LATE` its decode worker is only who would have been taken.
        decode: None also when it is to be chosen while the prompt is computed (`Binding.LATE`).
        prefill_slack_s, decode_slack_s: how much more the computing, and the decoding, worker may cost than thought
            before the next best without it wins; inf: there is no other.
        max_queued_tokens: what may wait at the worker that computes the prompt, for the placement to be still right;
            None: whatever waits, there is no other.
        max_requests_held: the same of the worker that decodes.
        num_eligible: workers that could be asked.
        decision_s: what deciding took.
        staleness_s: age of the shared state that it rests on.
    """

    winner: Candidate
    mode_reason: ModeReason
    reason: PickReason
    binding: Binding
    ranked: CandidateList
    prefill_slack_s: float = float("inf")
    decode_slack_s: float = float("inf")
    max_queued_tokens: int | None = None
    max_requests_held: int | None = None
    num_eligible: int = 0
    staleness_s: float = 0.0
    decision_s: float = 0.0

    @property
    def mode(self) -> Mode:
        return self.winner.mode

    @property
    def prefill(self) -> WorkerId | None:
        return self.winner.prefill

    @property
    def decode(self) -> WorkerId | None:
        return None if self.binding is Binding.LATE else self.winner.decode

    @property
    def terms(self) -> CostTerms:
        return self.winner.terms

    @property
    def ttft_s(self) -> float:
        return self.winner.ttft_s

    @property
    def tpot_s(self) -> float:
        return self.winner.tpot_s

    def candidates(self) -> list[Candidate]:
        """Return the best of what was weighed, cheapest first."""
        return [self.ranked.at(position) for position in range(len(self.ranked))]


@dataclass(frozen=True, slots=True)
class NoCandidate:
    """Nobody can be asked now. `role` is the one that is missing."""

    role: Role
    obstacle: Obstacle
