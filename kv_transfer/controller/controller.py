"""The controller's policy: the model's predictions, corrected by experience, and the choice among at most four arms."""

import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from operator import attrgetter

from kv_transfer.choice import TransferObservation, TransferQuestion
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.bandit import NOISE_VARIANCE, Experience
from kv_transfer.controller.choosing import Entry, Incumbent, choose
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.cooldown import BLAMED_ON_PROFILES, Cooldowns
from kv_transfer.controller.crowding import Crowding
from kv_transfer.controller.decisions import Decision, DecisionReason
from kv_transfer.controller.envelope import lower_envelope
from kv_transfer.controller.estimates import Estimate, Estimator, ratio_key
from kv_transfer.controller.floors import FloorFilter
from kv_transfer.controller.model import MIN_EXPOSED_S
from kv_transfer.controller.policy import Pipeline, Place, place

_RATIO_NOISE_VARIANCE = 0.05**2
_QUEUE_NOISE_VARIANCE = 0.3**2  # of the queue's part of the time
_SCORE = attrgetter("score_s")
_OPTIMISM = 0.06  # doubt of a goodput that so many transfers in a row have not put to the test, per root of them
_MAX_UNTESTED = 100
_TESTS_WIRE = 0.5  # sensitivity from which a transfer does


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
        self._estimator = Estimator(self._experience)
        self._untested: OrderedDict[str, int] = OrderedDict()
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
        estimates = self._estimator.estimates(allowed, where, now)
        self._set_prices(estimates, where, self._crowding.asked(question.peer, now), terms.budget_s)
        entries = self._entries(self._shortlist(estimates, where, now), where, question, now)
        context = (question.peer, where.size_bucket, terms.quality_floor)
        chosen = choose(
            entries,
            self._incumbents.get(context),
            terms.budget_s,
            where.situation.compute_s,
            self._config,
            is_prior=where.is_prior,
        )
        self._remember(context, chosen.incumbent)
        reason = chosen.reason if len(self.arms) > 1 else DecisionReason.NO_PROFILES
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

    def _set_prices(
        self, estimates: Sequence[Estimate], where: Place, arrival_rate: float, budget_s: float | None
    ) -> None:
        """Set the price of crowding of each, in seconds; none when only the fastest may meet the budget."""
        least_s = min([estimate.times.occupancy_s for estimate in estimates])
        price_of = self._crowding.pricing(least_s, where.situation.queue_s, arrival_rate)
        for estimate in estimates:
            estimate.price_s = price = price_of(estimate.times.occupancy_s)
            estimate.score_s = estimate.total_s + price
        if budget_s is not None and min(estimates, key=_SCORE).exposed_s > budget_s:
            for estimate in estimates:
                estimate.price_s, estimate.score_s = 0.0, estimate.total_s

    def _shortlist(self, estimates: Sequence[Estimate], where: Place, now: float) -> list[Estimate]:
        """Return the best, its neighbours on the envelope over 1/B, and `none`: four at most.

        A neighbour gives way to one that might be faster than the best if its codec is as fast as the doubt allows, or
        to one that is about as fast as the best and less lossy: both may be nowhere on the envelope.
        """
        best = min(estimates, key=_SCORE)
        order = sorted(estimates, key=_wire)
        hull = lower_envelope([(each.times.encode_s + each.times.decode_s, each.times.wire_s) for each in order])
        before = after = best
        best_at = order.index(best)
        for at in hull:
            if at < best_at:
                before = order[at]
            elif at > best_at:
                after = order[at]
                break
        best_s = best.score_s
        limit_s = best_s * (1.0 + self._config.quality_margin_ratio)
        challenger, challenger_s = None, best_s
        none = estimates[0]
        for estimate in estimates:
            score_s = estimate.score_s
            if estimate is best or estimate is none or score_s > 2.0 * best_s:
                continue
            if score_s <= limit_s and estimate.arm.loss_rank < best.arm.loss_rank:
                challenger = estimate
                break
            optimistic_s = score_s - self._estimator.codec_doubt_s(estimate, score_s - challenger_s, where, now)
            if optimistic_s < challenger_s:
                challenger, challenger_s = estimate, optimistic_s
        if challenger is not None and challenger is not before and challenger is not after:
            if before is best or before is none or (after is not best and before.score_s >= after.score_s):
                before = challenger
            else:
                after = challenger
        return list(dict.fromkeys((best, before, after, none)))

    def _entries(
        self, shortlist: Sequence[Estimate], where: Place, question: TransferQuestion, now: float
    ) -> list[Entry]:
        config, budget_s = self._config, question.terms.budget_s
        may_try = config.exploration > 0.0 and not where.is_prior and len(shortlist) > 1
        limit_s = min(map(_SCORE, shortlist)) * config.max_exploration_ratio
        gauss = self._gauss
        machine_error = wire_error = untested = 0.0
        if may_try:
            machine_error, wire_error = gauss(0.0, 1.0), gauss(0.0, 1.0)
            untested = abs(gauss(0.0, 1.0)) * _OPTIMISM * math.sqrt(self._untested.get(question.peer, 0))
        entries = []
        for estimate in shortlist:
            score_s = sampled_s = estimate.score_s
            doubt = 0.0
            if may_try and score_s <= limit_s:
                variance = error = 0.0
                for cause in self._estimator.causes(estimate, where):
                    spread = cause.sensitivity * math.sqrt(self._experience.believe(cause.key, now)[1])
                    variance += spread * spread
                    kind = cause.key.kind
                    if kind == "machine":
                        error += spread * machine_error
                    elif kind == "wire":
                        error += spread * wire_error - cause.sensitivity * untested
                    else:
                        error += spread * gauss(0.0, 1.0)
                doubt = math.sqrt(variance)
                if budget_s is None or estimate.exposed_s * math.exp(doubt) <= budget_s:
                    sampled_s += estimate.exposed_s * (math.exp(config.exploration * error) - 1.0)
            entries.append(Entry(estimate.arm, estimate.candidate(doubt), score_s, sampled_s))
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
        exposed_s = _exposed_s(observation)
        missed = budget_s is not None and decision.meets_budget and exposed_s > budget_s
        self._cooldowns.ended(link_class, name, is_miss=missed, now=now)
        where = self._hindsight(decision, observation)
        arm = self.arms[name]
        if arm.loss_rank and observation.payload_bytes > 0:
            log_ratio = math.log(observation.raw_bytes / observation.payload_bytes / arm.ratio)
            self._experience.learn_directly(ratio_key(arm, where), log_ratio, _RATIO_NOISE_VARIANCE, now)
        (estimate,) = self._estimator.estimates((arm,), where, now)
        causes = self._estimator.causes(estimate, where)
        log_error = math.log(exposed_s / estimate.exposed_s)
        self._experience.learn(where.link_class, log_error, _noise(decision, where, estimate), causes, now)
        self._note_test(question.peer, tests_wire=causes[1].sensitivity >= _TESTS_WIRE)
        return self._regret_s(decision, where, now)

    def _hindsight(self, decision: Decision, observation: TransferObservation) -> Place:
        """Return the decision's place with what is known by now of the link and of the prefill."""
        goodput = observation.goodput_bytes_per_s or decision.question.link.goodput_bytes_per_s
        return place(
            decision.question,
            self._config,
            self._pipeline,
            goodput_bytes_per_s=goodput,
            compute_s=max(0.0, observation.observed_s - _exposed_s(observation)),
            encode_backlog_s=decision.encode_backlog_s,
        )

    def _note_test(self, peer: str, *, tests_wire: bool) -> None:
        """Count the transfers in a row that said nothing of the goodput: it may have risen since, and nobody knows."""
        untested = self._untested.pop(peer, 0)
        self._untested[peer] = 0 if tests_wire else min(_MAX_UNTESTED, untested + 1)
        if len(self._untested) > self._config.max_contexts:
            self._untested.popitem(last=False)

    def _regret_s(self, decision: Decision, where: Place, now: float) -> float:
        arms = tuple(self.arms[candidate.profile] for candidate in decision.candidates)
        totals = {estimate.arm.name: estimate.total_s for estimate in self._estimator.estimates(arms, where, now)}
        return totals[decision.chosen.profile] - min(totals.values())


def _wire(estimate: Estimate) -> float:
    return -estimate.times.wire_s


def _exposed_s(observation: TransferObservation) -> float:
    """Return what came after both the prefill and the question: the one may have ended before the other. Pure."""
    exposed_s = observation.exposed_s
    if exposed_s is None or exposed_s > observation.observed_s:
        exposed_s = observation.observed_s
    return max(exposed_s, MIN_EXPOSED_S)


def _noise(decision: Decision, where: Place, estimate: Estimate) -> float:
    """Return the variance of the log of the exposed time that is nobody's fault."""
    magnified = estimate.total_s / estimate.exposed_s  # the error of a difference, as a part of it
    noise = NOISE_VARIANCE * min(magnified, 10.0) ** 2
    noise += _QUEUE_NOISE_VARIANCE * min(1.0, where.situation.queue_s / estimate.exposed_s) ** 2
    if not decision.is_prior:
        moved = math.log(where.goodput_bytes_per_s / decision.goodput_bytes_per_s)
        noise += moved * moved
    return noise
