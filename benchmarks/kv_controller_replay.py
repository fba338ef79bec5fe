"""A pure world in which policies are replayed: frames through codec threads, a wire whose goodput drifts, and queues.

The truth is known here and differs from what policies are told: codecs are slower or faster than their profiles say,
the goodput changes while frames are on the wire, times are noisy. Policies see what they see in a worker: the estimate
of `link_estimate.GoodputEstimator`, the bytes queued, the outcome. All policies meet the same jobs, the same noise.

`replay_oracle` is the bound: it tries every allowed arm in the true world, the noise included, and takes the best.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from core.ids import RequestId, TransferId, WorkerId
from kv_transfer.choice import LinkView, TransferObservation, TransferQuestion, TransferTerms
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.decisions import Decision
from kv_transfer.controller.policy import Pipeline, Policy
from kv_transfer.sender.link_estimate import GoodputEstimator

_PEER = WorkerId("peer")


@dataclass(frozen=True, slots=True)
class Trace:
    """Goodput over time, piecewise constant; the last value holds on.

    Attributes:
        starts_s: of the pieces, ascending from 0.
        bytes_per_s: of each piece.
    """

    starts_s: Sequence[float]
    bytes_per_s: Sequence[float]

    def delivered_at(self, begin_s: float, num_bytes: float) -> float:
        """Return when `num_bytes` that begin to flow at `begin_s` have flowed. Pure."""
        piece = bisect_right(self.starts_s, begin_s) - 1
        now, left = begin_s, num_bytes
        while piece + 1 < len(self.starts_s):
            end = self.starts_s[piece + 1]
            flows = (end - now) * self.bytes_per_s[piece]
            if flows >= left:
                break
            left -= flows
            now = end
            piece += 1
        return now + left / self.bytes_per_s[piece]


@dataclass(frozen=True, slots=True)
class Job:
    """One transfer to be: reserved at `at_s`, with the prefill still computing for `compute_s`."""

    at_s: float
    raw_bytes: int
    terms: TransferTerms
    wire_noise: float = 1.0
    codec_noise: float = 1.0


@dataclass(frozen=True, slots=True)
class Truth:
    """What the world is really like.

    Attributes:
        codec_factors: by arm: true codec time over the profile's.
        ratio_factors: by arm: true ratio over the profile's.
        rtt_s: of a small message.
        overhead_s: of each transfer, that no model knows of.
    """

    trace: Trace
    codec_factors: Mapping[str, float] = field(default_factory=dict)
    ratio_factors: Mapping[str, float] = field(default_factory=dict)
    rtt_s: float = 0.0005
    overhead_s: float = 0.0005
    carrier: str = "tcp"


@dataclass(slots=True)
class _Stations:
    """When each codec thread and the wire are free."""

    encoders: list[float]
    decoders: list[float]
    wire: float = 0.0

    def copy(self) -> "_Stations":
        return _Stations(list(self.encoders), list(self.decoders), self.wire)


@dataclass(frozen=True, slots=True)
class _Passage:
    """One frame on the wire."""

    begin_s: float
    end_s: float
    num_bytes: int
    is_backlogged: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """One transfer through the world."""

    acked_at_s: float
    payload_bytes: int
    passages: tuple[_Passage, ...]


class World:
    """The stations, and what a policy may see of them."""

    def __init__(self, truth: Truth, pipeline: Pipeline) -> None:
        self._truth = truth
        self._pipeline = pipeline
        self._stations = _Stations([0.0] * pipeline.codec_threads, [0.0] * pipeline.codec_threads)
        self._estimator = GoodputEstimator()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._wire_bytes = 0  # that will have crossed the wire, this far
        self._queued: list[tuple[float, int]] = []  # when they have flowed, bytes

    def cost_s(self, job: Job, arm: Arm) -> float:
        """Return how long a job would take now; nothing happens. What the oracle asks."""
        return self._pass(job, arm, self._stations.copy()).acked_at_s - job.at_s

    def wire_s(self, job: Job, arm: Arm) -> float:
        """Return how long a job would keep the wire busy if it began now."""
        ratio = arm.ratio * self._truth.ratio_factors.get(arm.name, 1.0)
        return self._truth.trace.delivered_at(job.at_s, job.raw_bytes / ratio * job.wire_noise) - job.at_s

    def question(self, job: Job, idx: int) -> TransferQuestion:
        """Let the time pass until the job's, and return what is asked."""
        self._pass_time(job.at_s)
        self._estimator.exchanged(self._truth.rtt_s)  # the offer and the reservation
        self._queued = [(end_s, num_bytes) for end_s, num_bytes in self._queued if end_s > job.at_s]
        link = LinkView(
            self._truth.carrier,
            self._estimator.goodput_bytes_per_s,
            self._truth.rtt_s,
            sum(num_bytes for _, num_bytes in self._queued),
        )
        name = str(idx)
        return TransferQuestion(TransferId(name), RequestId(name), _PEER, job.raw_bytes, 1, job.terms, link)

    def perform(self, job: Job, arm: Arm, tell: Callable[[float, float, int, float | None], None]) -> float:
        """Let a job go through. `tell(now, observed_s, payload_bytes, goodput)` is called when its time has come.

        Returns:
            Seconds from its beginning to its end.
        """
        run = self._pass(job, arm, self._stations)
        for passage in run.passages:
            self._wire_bytes += passage.num_bytes
            self._queued.append((passage.end_s, passage.num_bytes))
            self._see(passage, self._wire_bytes)
        observed_s = run.acked_at_s - job.at_s
        self._at(
            run.acked_at_s,
            lambda: tell(run.acked_at_s, observed_s, run.payload_bytes, self._estimator.goodput_bytes_per_s),
        )
        return observed_s

    def finish(self) -> None:
        """Let everything end."""
        self._pass_time(math.inf)

    def _see(self, passage: _Passage, cumulative: int) -> None:
        self._at(passage.begin_s, lambda: self._estimator.sent(passage.begin_s, cumulative, passage.is_backlogged))
        at_s = passage.end_s + self._truth.rtt_s
        self._at(at_s, lambda: self._estimator.acknowledged(at_s, cumulative))

    def _at(self, at_s: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at_s, self._sequence, action))

    def _pass_time(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            heapq.heappop(self._events)[2]()

    def _pass(self, job: Job, arm: Arm, stations: _Stations) -> _Run:
        truth = self._truth
        codec_factor = truth.codec_factors.get(arm.name, 1.0) * job.codec_noise
        ratio = arm.ratio * truth.ratio_factors.get(arm.name, 1.0)
        frame_bytes = self._pipeline.frame_bytes(job.raw_bytes)
        begin_s = job.at_s + truth.overhead_s
        passages: list[_Passage] = []
        ready: list[float] = []
        landed_s = begin_s
        done_bytes = payload_bytes = 0
        while done_bytes < job.raw_bytes:
            num_bytes = min(frame_bytes, job.raw_bytes - done_bytes)
            done_bytes += num_bytes
            ready_s = begin_s + job.terms.compute_s * done_bytes / job.raw_bytes
            wire_bytes = max(1, round(num_bytes / ratio))
            payload_bytes += wire_bytes
            if arm.loss_rank:
                seconds = (arm.encode_fixed_s + arm.encode_s_per_byte * num_bytes) * codec_factor
                ready_s = max(ready_s, stations.encoders[0]) + seconds
                heapq.heapreplace(stations.encoders, ready_s)
            ready.append(ready_s)
            sent_s = max(ready_s, stations.wire)
            stations.wire = truth.trace.delivered_at(sent_s, wire_bytes * job.wire_noise)
            passages.append(_Passage(sent_s, stations.wire, wire_bytes, is_backlogged=False))
            arrived_s = stations.wire + truth.rtt_s / 2
            if arm.loss_rank:
                seconds = (arm.decode_fixed_s + arm.decode_s_per_byte * num_bytes) * codec_factor
                arrived_s = max(arrived_s, stations.decoders[0]) + seconds
                heapq.heapreplace(stations.decoders, arrived_s)
            landed_s = max(landed_s, arrived_s)
        behind = [
            _Passage(passage.begin_s, passage.end_s, passage.num_bytes, following_s <= passage.begin_s)
            for passage, following_s in zip(passages, [*ready[1:], math.inf], strict=True)
        ]
        return _Run(landed_s + truth.rtt_s / 2, payload_bytes, tuple(behind))


def replay(policy: Policy, jobs: Sequence[Job], truth: Truth, pipeline: Pipeline) -> list[float]:
    """Return the seconds that each job took under a policy."""
    world = World(truth, pipeline)
    times = []
    for idx, job in enumerate(jobs):
        decision = policy.decide(world.question(job, idx), job.at_s)
        tell = partial(_tell, policy, decision)
        times.append(world.perform(job, policy.arms[decision.chosen.profile], tell))
    world.finish()
    return times


def _tell(
    policy: Policy, decision: Decision, now: float, observed_s: float, payload_bytes: int, goodput: float | None
) -> None:
    question = decision.question
    exposed_s = max(1e-6, observed_s - question.terms.compute_s)
    observation = TransferObservation(
        question.transfer_id, observed_s, exposed_s, question.raw_bytes, payload_bytes, "", goodput
    )
    policy.learn(decision, observation, now)


def replay_oracle(
    arms: Sequence[Arm], jobs: Sequence[Job], truth: Truth, pipeline: Pipeline, *, altruism: float = 0.0
) -> list[float]:
    """Return the seconds that each job takes when the best arm for it is known.

    Args:
        altruism: weight of the wire time that an arm takes from those that come later; the best oracle of a trace is
            the best over some weights, since jobs that queue are not independent.
    """
    world = World(truth, pipeline)
    times = []
    for job in jobs:
        allowed = [arm for arm in arms if arm.meets(job.terms.quality_floor)]
        best = min(allowed, key=lambda arm: world.cost_s(job, arm) + altruism * world.wire_s(job, arm))
        times.append(world.perform(job, best, lambda now, observed_s, payload_bytes, goodput: None))
    world.finish()
    return times
