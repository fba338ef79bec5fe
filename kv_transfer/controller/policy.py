"""The port of policies, and what they share: how a question becomes a situation, and an arm a candidate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kv_transfer.choice import LinkView, TransferObservation, TransferQuestion
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.bandit import Experience
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.decisions import Candidate, Decision
from kv_transfer.controller.model import Situation, predict, situation

_UNKNOWN_CARRIER_BYTES_PER_S = 1e9


class Policy(Protocol):
    """Decides, and learns. Synchronous; time is an argument; randomness was one.

    Attributes:
        experience: what is worth to be kept over a restart; None: nothing.
    """

    arms: Mapping[str, Arm]

    @property
    def experience(self) -> Experience | None: ...

    def decide(self, question: TransferQuestion, now: float) -> Decision:
        """Return the decision, which `learn` will be given back."""
        ...

    def learn(self, decision: Decision, observation: TransferObservation, now: float) -> float:
        """Learn from what came of a decision, exactly once each. Returns the estimated regret in seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What does not change between questions.

    Attributes:
        frames_per_transfer: that a coded transfer is cut into, within the bounds on a frame's raw bytes.
        codec_threads: on either side.
    """

    frames_per_transfer: int
    min_frame_bytes: int
    max_frame_bytes: int
    codec_threads: int

    def frame_bytes(self, raw_bytes: int) -> int:
        """Return the raw bytes of a full frame of such a transfer. Pure."""
        return min(self.max_frame_bytes, max(self.min_frame_bytes, -(-raw_bytes // self.frames_per_transfer)))


class Place(NamedTuple):
    """A question's situation, and where it is looked up in experience.

    Attributes:
        link_class: the carrier; with "?" while the goodput is a prior.
        goodput_class, size_bucket: powers of four.
    """

    situation: Situation
    link_class: str
    goodput_class: int
    size_bucket: int
    goodput_bytes_per_s: float
    is_prior: bool


def place(
    question: TransferQuestion,
    config: ControllerConfig,
    pipeline: Pipeline,
    *,
    goodput_bytes_per_s: float | None,
    compute_s: float,
    encode_backlog_s: float = 0.0,
) -> Place:
    """Return the place of a question, with a goodput and a prefill time that may be known better by now. Pure."""
    link = question.link
    goodput = goodput_bytes_per_s
    is_prior = goodput is None
    if goodput is None:
        goodput = prior_goodput(link, config)
    raw_bytes = max(1, question.raw_bytes)
    at = situation(
        raw_bytes,
        pipeline.frame_bytes(raw_bytes),
        goodput,
        rtt_s=config.prior_rtt_s if link.rtt_s is None else link.rtt_s,
        queued_bytes=link.queued_bytes,
        encode_backlog_s=encode_backlog_s,
        compute_s=compute_s,
        codec_threads=pipeline.codec_threads,
    )
    link_class = link.carrier + "?" if is_prior else link.carrier
    return Place(at, link_class, math.frexp(goodput)[1] // 2, raw_bytes.bit_length() // 2, goodput, is_prior)


def prior_goodput(link: LinkView, config: ControllerConfig) -> float:
    """Return what is assumed of a link on which nothing was measured. Pure."""
    return config.prior_goodput_bytes_per_s.get(link.carrier, _UNKNOWN_CARRIER_BYTES_PER_S)


def bare_candidate(arm: Arm, at: Situation) -> Candidate:
    """Return an arm's terms by the model alone. Pure."""
    times = predict(arm, at)
    return Candidate(
        arm.name,
        times.total_s,
        times.total_s,
        0.0,
        times.encode_s,
        times.wire_s,
        times.decode_s,
        doubt=0.0,
        codec_factor=1.0,
        wire_factor=1.0,
        residual=1.0,
        is_hidden=times.is_hidden,
    )
