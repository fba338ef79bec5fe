"""The controller's policy: the model's predictions, corrected by experience, and the choice among at most four arms."""

import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from kv_transfer.choice import TransferObservation, TransferQuestion
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.bandit import NOISE_VARIANCE, Cause, Experience, Key
from kv_transfer.controller.choosing import Entry, Incumbent, choose
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.cooldown import BLAMED_ON_PROFILES, Cooldowns
from kv_transfer.controller.crowding import Crowding
from kv_transfer.controller.decisions import Candidate, Decision, DecisionReason
from kv_transfer.controller.envelope import lower_envelope
from kv_transfer.controller.floors import FloorFilter
from kv_transfer.controller.model import Prediction, exposed_s, predict, sensitivity
from kv_transfer.controller.policy import Pipeline, Place, place

_RATIO_NOISE_VARIANCE = 0.05**2
_QUEUE_NOISE_VARIANCE = 0.3**2  # of the queue's part of the time
_MACHINE = Key("machine")
_UNMEASURED = {DecisionReason.FASTEST, DecisionReason.LESS_LOSSY, DecisionReason.KEPT}


class _Estimate:
    """One arm in one place, with what is believed of it."""

    __slots__ = ("arm", "codec_factor", "exposed_s", "residual", "times", "total_s", "wire_factor")

    def __init__(
        self, arm: Arm, times: Prediction, compute_s: float, codec_factor: float, wire_factor: float, residual: float
    ) -> None:
        self.arm = arm
        self.times = times
        self.codec_factor = codec_factor
        self.wire_factor = wire_factor
        self.residual = residual
        self.exposed_s = exposed_s(times.total_s, compute_s) * residual
        self.total_s = compute_s + self.exposed_s


class ControllerPolicy:
    """Implements `Policy`."""

    def __init__(self, arms: Sequence[Arm], config: ControllerConfig, pipeline: Pipeline, rng: random.Random) -> None:
        self.arms: Mapping[str, Arm] = {arm.name: arm for arm in arms}
        self._experience = Experience(
            knowledge_s=config.knowledge_s, max_contexts=config.max_contexts, context_ttl_s=config.context_ttl_s
        )
        self._config = config
        self._pipeline = pipeline
        self._gauss = rng.gauss
        self._floors = FloorFilter(arms)
        self._cooldowns = Cooldowns(misses=config.cooldown_misses, duration_s=config.cooldown_s)
        self._crowding = Crowding(config.crowding)
        self._incumbents: OrderedDict[tuple[str, int, float], Incumbent] = OrderedDict()

    @property
    def experience(self) -> Experience:
        return self._experience

    # --- the decision -------------------------------------------------------------------------------------------------

    def decide(self, question: TransferQuestion, now: float) -> Decision:
        terms = question.terms
        backlog_s = self._crowding.encode_backlog_s(now)
        where = place(
            question,
            self._config,
            self._pipeline,
            goodput_bytes_per_s=question.link.goodput_bytes_per_s,
            compute_s=terms.compute_s,
            encode_backlog_s=backlog_s,
        )
        allowed = self._floors.allowed(terms.quality_floor)
        resting = self._cooldowns.resting(where.link_class, now)
        if resting:
            allowed = tuple(arm for arm in allowed if arm.loss_rank == 0 or arm.name not in resting)
        estimates = self._estimates(allowed, where, now)
        arrival_rate = self._crowding.asked(question.peer, now)
        prices = self._prices(estimates, where, arrival_rate, terms.budget_s)
        entries = self._entries(self._shortlist(estimates, prices), where, terms.budget_s, now)
        context = (question.peer, where.size_bucket, terms.quality_floor)
        chosen = choose(entries, self._incumbents.get(context), terms.budget_s, where.situation.compute_s, self._config)
        self._remember(context, chosen.incumbent)
        reason = chosen.reason
        if len(self.arms) == 1:
            reason = DecisionReason.NO_PROFILES
        elif where.is_prior and reason in _UNMEASURED:
            reason = DecisionReason.UNMEASURED_LINK
        candidate = chosen.entry.candidate
        self._crowding.chosen(candidate.encode_s / self._pipeline.codec_threads, now)
        return Decision(
            question,
            now,
            candidate,
            tuple(entry.candidate for entry in entries),
            reason,
            where.goodput_bytes_per_s,
            where.is_prior,
            where.situation.queue_s,
            backlog_s,
            chosen.meets_budget,
        )

    def _estimates(self, arms: Sequence[Arm], where: Place, now: float) -> list[_Estimate]:
        believe, exp, at = self._experience.believe, math.exp, where.situation
        machine = believe(_MACHINE, now)[0]
        wire = believe(self._wire_key(where), now)[0]
        estimates = []
        for arm in arms:
            name = arm.name
            codec_factor = 1.0
            wire_factor = wire
            if arm.loss_rank:
                codec_factor = exp(machine + believe(Key("codec", "", name), now)[0])
                wire_factor -= believe(Key("ratio", "", name, 0, where.size_bucket), now)[0]
            wire_factor = exp(wire_factor)
            rest = believe(Key("rest", where.link_class, name, where.goodput_class, where.size_bucket), now)[0]
            times = predict(arm, at, codec_factor, wire_factor)
            estimates.append(_Estimate(arm, times, at.compute_s, codec_factor, wire_factor, exp(rest)))
        return estimates

    def _prices(
        self, estimates: Sequence[_Estimate], where: Place, arrival_rate: float, budget_s: float | None
    ) -> list[float]:
        """Return the price of crowding of each, in seconds; none when only the fastest may meet the budget."""
        least_s = min(estimate.times.occupancy_s for estimate in estimates)
        queue_s = where.situation.queue_s
        prices = [
            self._crowding.price_s(estimate.times.occupancy_s, least_s, queue_s, arrival_rate) for estimate in estimates
        ]
        if budget_s is not None:
            best = min(range(len(estimates)), key=lambda idx: estimates[idx].total_s + prices[idx])
            if estimates[best].exposed_s > budget_s:
                return [0.0] * len(estimates)
        return prices

    def _shortlist(self, estimates: Sequence[_Estimate], prices: Sequence[float]) -> list[tuple[_Estimate, float]]:
        """Return the best, its neighbours on the envelope over 1/B, and `none`, with their prices.

        One that is about as fast and less lossy takes the place of a neighbour: it may be nowhere on the envelope.
        """
        best = min(range(len(estimates)), key=lambda idx: estimates[idx].total_s + prices[idx])
        order = sorted(range(len(estimates)), key=lambda idx: -estimates[idx].times.wire_s)
        hull = lower_envelope(
            [
                (estimates[idx].times.encode_s + estimates[idx].times.decode_s, estimates[idx].times.wire_s)
                for idx in order
            ]
        )
        before: int | None = None
        after: int | None = None
        best_at = order.index(best)
        for at in hull:
            if at < best_at:
                before = order[at]
            elif at > best_at:
                after = order[at]
                break
        near = self._less_lossy(estimates, prices, best)
        if near is not None and near not in (before, after):
            before = near
        shortlist = {best: None, before: None, after: None, 0: None}
        return [(estimates[idx], prices[idx]) for idx in shortlist if idx is not None]

    def _less_lossy(self, estimates: Sequence[_Estimate], prices: Sequence[float], best: int) -> int | None:
        """Return the least lossy arm within the quality margin of the best one, if there is one. Arms are in order."""
        limit_s = (estimates[best].total_s + prices[best]) * (1.0 + self._config.quality_margin_ratio)
        for idx in range(1, best):
            if estimates[idx].total_s + prices[idx] <= limit_s:
                return idx
        return None

    def _entries(
        self, shortlist: Sequence[tuple[_Estimate, float]], where: Place, budget_s: float | None, now: float
    ) -> list[Entry]:
        config = self._config
        may_try = config.exploration > 0.0 and not where.is_prior and len(shortlist) > 1
        limit_s = min(estimate.total_s + price for estimate, price in shortlist) * config.max_exploration_ratio
        machine_error = wire_error = 0.0
        if may_try:
            machine_error, wire_error = self._gauss(0.0, 1.0), self._gauss(0.0, 1.0)
        entries = []
        for estimate, price_s in shortlist:
            causes = self._causes(estimate, where)
            deviations = [
                cause.sensitivity * math.sqrt(self._experience.believe(cause.key, now)[1]) for cause in causes
            ]
            doubt = math.sqrt(sum(deviation * deviation for deviation in deviations))
            score_s = sampled_s = estimate.total_s + price_s
            has_slack = budget_s is None or estimate.exposed_s * math.exp(doubt) <= budget_s
            if may_try and has_slack and score_s <= limit_s:
                error = 0.0
                for cause, deviation in zip(causes, deviations, strict=True):
                    if cause.key.kind == "machine":
                        error += deviation * machine_error
                    elif cause.key.kind == "wire":
                        error += deviation * wire_error
                    else:
                        error += deviation * self._gauss(0.0, 1.0)
                sampled_s += estimate.exposed_s * (math.exp(config.exploration * error) - 1.0)
            entries.append(Entry(estimate.arm, _candidate(estimate, price_s, doubt, where), score_s, sampled_s))
        return entries

    def _remember(self, context: tuple[str, int, float], incumbent: Incumbent) -> None:
        self._incumbents[context] = incumbent
        self._incumbents.move_to_end(context)
        if len(self._incumbents) > self._config.max_contexts:
            self._incumbents.popitem(last=False)

    # --- learning -----------------------------------------------------------------------------------------------------

    def learn(self, decision: Decision, observation: TransferObservation, now: float) -> float:
        self._crowding.ended(now)
        self._experience.evict(now)
        question, name = decision.question, decision.chosen.profile
        link_class = question.link.carrier + ("?" if decision.is_prior else "")
        if observation.failure or observation.exposed_s is None:
            if observation.failure in BLAMED_ON_PROFILES:
                self._cooldowns.ended(link_class, name, is_miss=True, now=now)
            return 0.0
        budget_s = question.terms.budget_s
        missed = budget_s is not None and decision.meets_budget and observation.exposed_s > budget_s
        self._cooldowns.ended(link_class, name, is_miss=missed, now=now)
        where = self._hindsight(decision, observation)
        arm = self.arms[name]
        if arm.loss_rank and observation.payload_bytes > 0:
            log_ratio = math.log(observation.raw_bytes / observation.payload_bytes / arm.ratio)
            ratio_key = Key("ratio", "", name, 0, where.size_bucket)
            self._experience.learn_directly(ratio_key, log_ratio, _RATIO_NOISE_VARIANCE, now)
        (estimate,) = self._estimates((arm,), where, now)
        log_error = math.log(max(observation.exposed_s, 1e-6) / estimate.exposed_s)
        causes = self._causes(estimate, where)
        self._experience.learn(where.link_class, log_error, self._noise(decision, where, estimate), causes, now)
        return self._regret_s(decision, where, now)

    def _hindsight(self, decision: Decision, observation: TransferObservation) -> Place:
        """Return the decision's place with what is known by now of the link and of the prefill."""
        assert observation.exposed_s is not None
        goodput = observation.goodput_bytes_per_s or decision.question.link.goodput_bytes_per_s
        return place(
            decision.question,
            self._config,
            self._pipeline,
            goodput_bytes_per_s=goodput,
            compute_s=max(0.0, observation.observed_s - observation.exposed_s),
            encode_backlog_s=decision.encode_backlog_s,
        )

    def _noise(self, decision: Decision, where: Place, estimate: _Estimate) -> float:
        """Return the variance of the log of the exposed time that is nobody's fault."""
        magnified = estimate.total_s / estimate.exposed_s  # the error of a difference, as a part of it
        noise = NOISE_VARIANCE * min(magnified, 10.0) ** 2
        noise += _QUEUE_NOISE_VARIANCE * min(1.0, where.situation.queue_s / estimate.exposed_s) ** 2
        if not decision.is_prior:
            moved = math.log(where.goodput_bytes_per_s / decision.goodput_bytes_per_s)
            noise += moved * moved
        return noise

    def _regret_s(self, decision: Decision, where: Place, now: float) -> float:
        arms = [self.arms[candidate.profile] for candidate in decision.candidates]
        totals = {estimate.arm.name: estimate.total_s for estimate in self._estimates(arms, where, now)}
        return totals[decision.chosen.profile] - min(totals.values())

    # --- causes -------------------------------------------------------------------------------------------------------

    def _causes(self, estimate: _Estimate, where: Place) -> list[Cause]:
        name = estimate.arm.name
        depends = sensitivity(
            estimate.arm, where.situation, estimate.codec_factor, estimate.wire_factor, estimate.times
        )
        causes = [
            Cause(Key("rest", where.link_class, name, where.goodput_class, where.size_bucket), 1.0),
            Cause(self._wire_key(where), depends.wire),
        ]
        if estimate.arm.loss_rank:
            causes.append(Cause(Key("codec", "", name), depends.codec))
            causes.append(Cause(_MACHINE, depends.codec))
        return causes

    def _wire_key(self, where: Place) -> Key:
        return Key("guess" if where.is_prior else "wire", where.link_class)


def _candidate(estimate: _Estimate, price_s: float, doubt: float, where: Place) -> Candidate:
    times = estimate.times
    return Candidate(
        estimate.arm.name,
        times.total_s,
        estimate.total_s,
        price_s,
        times.encode_s,
        times.wire_s,
        times.decode_s,
        doubt,
        estimate.codec_factor,
        estimate.wire_factor,
        estimate.residual,
        times.is_hidden,
    )
