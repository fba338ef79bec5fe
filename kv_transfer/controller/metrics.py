"""How good the controller's predictions are, in the registry that the worker exports. Its choices are counted with the
transfers (`kv_transfer.metrics`), whoever makes them."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from kv_transfer.controller.decisions import Decision, Outcome

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ERRORS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)


class ControllerMetrics:
    """One set per registry; a second one in the same registry is an error of prometheus."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._predicted = Histogram(
            "tandem_kv_transfer_predicted_seconds",
            "Reserved to acknowledged, as predicted",
            ["profile"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._observed = Histogram(
            "tandem_kv_transfer_observed_seconds",
            "Reserved to acknowledged, as observed",
            ["profile"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._error = Histogram(
            "tandem_kv_transfer_prediction_error_ratio",
            "Observed over predicted time",
            registry=registry,
            buckets=_ERRORS,
        )
        self._regret = Counter(
            "tandem_kv_transfer_regret_seconds",
            "Estimated time lost against the best candidate in hindsight",
            registry=registry,
        )

    def ended(self, decision: Decision, outcome: Outcome) -> None:
        if outcome.observation.failure:
            return
        profile, observed_s = decision.chosen.profile, outcome.observation.observed_s
        self._predicted.labels(profile).observe(decision.chosen.predicted_s)
        self._observed.labels(profile).observe(observed_s)
        self._error.observe(observed_s / decision.chosen.predicted_s)
        self._regret.inc(outcome.regret_s)
