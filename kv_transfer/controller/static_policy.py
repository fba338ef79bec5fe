"""One named profile for every transfer whose floor it meets, and for the others the faster of the lossless ones."""

from collections.abc import Mapping, Sequence

from core.errors import ConfigError
from kv_transfer.choice import TransferObservation, TransferQuestion
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.decisions import Decision, DecisionReason
from kv_transfer.controller.model import exposed_s
from kv_transfer.controller.policy import Pipeline, bare_candidate, place


class StaticPolicy:
    """Implements `Policy` without experience: the prediction is the model's."""

    def __init__(self, arms: Sequence[Arm], name: str, config: ControllerConfig, pipeline: Pipeline) -> None:
        """Raises:
        ConfigError: there is no such profile.
        """
        self.arms: Mapping[str, Arm] = {arm.name: arm for arm in arms}
        if name not in self.arms:
            known = ", ".join(self.arms)
            raise ConfigError(f"transfer.policy: there is no profile {name!r}; use controller, or one of {known}")
        self._arm = self.arms[name]
        self._lossless = [arm for arm in arms if arm.is_lossless]
        self._config = config
        self._pipeline = pipeline

    @property
    def experience(self) -> None:
        return None

    def decide(self, question: TransferQuestion, now: float) -> Decision:
        terms = question.terms
        where = place(
            question,
            self._config,
            self._pipeline,
            goodput_bytes_per_s=question.link.goodput_bytes_per_s,
            compute_s=terms.compute_s,
        )
        if self._arm.meets(terms.quality_floor):
            candidates = [bare_candidate(self._arm, where.situation)]
            reason = DecisionReason.STATIC if len(self.arms) > 1 else DecisionReason.NO_PROFILES
        else:
            candidates = [bare_candidate(arm, where.situation) for arm in self._lossless]
            reason = DecisionReason.STATIC_BELOW_FLOOR
        chosen = min(candidates, key=lambda candidate: candidate.predicted_s)
        exposed = exposed_s(chosen.predicted_s, terms.compute_s)
        return Decision(
            question,
            now,
            chosen,
            tuple(candidates),
            reason,
            where.goodput_bytes_per_s,
            where.is_prior,
            where.situation.queue_s,
            encode_backlog_s=0.0,
            meets_budget=terms.budget_s is None or exposed <= terms.budget_s,
        )

    def learn(self, decision: Decision, observation: TransferObservation, now: float) -> float:
        return 0.0
