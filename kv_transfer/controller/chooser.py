"""The shell that the sender holds: policy, ring, metrics and memory, joined to a `ProfileChooser`."""

import logging
from collections import OrderedDict

from core.clock import Clock
from kv_transfer.choice import Choice, TransferObservation, TransferQuestion
from kv_transfer.controller import memory
from kv_transfer.controller.decisions import Decision, DecisionRing, Json, Outcome
from kv_transfer.controller.metrics import ControllerMetrics
from kv_transfer.controller.policy import Policy

_log = logging.getLogger(__name__)
_MAX_OUTSTANDING = 65_536


class Chooser:
    """Implements `kv_transfer.choice.ProfileChooser`. Event loop only; nothing blocks."""

    def __init__(self, policy: Policy, clock: Clock, metrics: ControllerMetrics, max_decisions: int) -> None:
        self.policy = policy
        self._clock = clock
        self._metrics = metrics
        self._ring = DecisionRing(max_decisions)
        self._outstanding: OrderedDict[str, Decision] = OrderedDict()

    def choose(self, question: TransferQuestion) -> Choice:
        decision = self.policy.decide(question, self._clock.now())
        self._outstanding[question.transfer_id] = decision
        if len(self._outstanding) > _MAX_OUTSTANDING:
            self._outstanding.popitem(last=False)
        self._ring.add(decision)
        chosen = decision.chosen
        arm = self.policy.arms[chosen.profile]
        return Choice(chosen.profile, arm.encoder, chosen.predicted_s, decision.reason.value, arm.selection)

    def observe(self, observation: TransferObservation) -> None:
        decision = self._outstanding.pop(observation.transfer_id, None)
        if decision is None:
            _log.warning("transfer %s ended, and its profile was not asked for", observation.transfer_id)
            return
        now = self._clock.now()
        outcome = Outcome(observation, now, self.policy.learn(decision, observation, now))
        self._ring.add_outcome(decision, outcome)
        self._metrics.ended(decision, outcome)

    @property
    def experience_version(self) -> int:
        """Grows with whatever is learned; equal means that there is nothing new to save."""
        experience = self.policy.experience
        return 0 if experience is None else experience.version

    def snapshot(self) -> bytes:
        """Return what was learned, to be restored by a chooser of the same profiles."""
        experience = self.policy.experience
        if experience is None:
            return b""
        return memory.snapshot(experience, self.policy.arms.values(), self._clock.now())

    def restore(self, data: bytes) -> bool:
        """Replace what was learned. Returns False, with a line in the log, when `data` does not hold for this one."""
        experience = self.policy.experience
        if experience is None:
            return False
        return memory.restore(data, experience, self.policy.arms.values(), self._clock.now())

    def decisions(self, last: int = 100) -> list[Json]:
        """Return the last decisions, newest first, as plain values that JSON can hold."""
        return self._ring.view(last, self._clock.now())
