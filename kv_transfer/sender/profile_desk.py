"""Which profile each transfer of a sender uses: asks the chooser once, and tells it once what came of it."""

import logging
from dataclasses import dataclass

from core.clock import Clock
from core.ids import TransferId
from kv_transfer.choice import Choice, ProfileChooser, TransferObservation, TransferQuestion
from kv_transfer.codec import RAW
from kv_transfer.metrics import KvTransferMetrics

_log = logging.getLogger(__name__)
_RATIO_WEIGHT = 0.3
_FALLBACK = Choice("none", RAW, None, "chooser_failed")


@dataclass(frozen=True, slots=True)
class _Asked:
    raw_bytes: int
    profile: str
    at: float


class ProfileDesk:
    """Between the sessions of one sender and its chooser. Event loop only."""

    def __init__(self, chooser: ProfileChooser, clock: Clock, metrics: KvTransferMetrics) -> None:
        self._chooser = chooser
        self._clock = clock
        self._metrics = metrics
        self._asked: dict[TransferId, _Asked] = {}
        # Payload / raw, by profile and size class: what the queue is estimated with. What is small codes poorly.
        self._coded_shares: dict[str, dict[int, float]] = {}

    def choose(self, question: TransferQuestion) -> Choice:
        """Ask for a transfer that was reserved just now."""
        try:
            choice = self._chooser.choose(question)
        except Exception:  # a defect of the controller costs the compression of a transfer, not the transfer
            _log.exception("choosing a profile for %s", question.transfer_id)
            choice = _FALLBACK
        else:
            self._asked[question.transfer_id] = _Asked(question.raw_bytes, choice.profile, self._clock.now())
        self._metrics.decisions.labels(choice.profile, choice.reason).inc()
        return choice

    def expected_bytes(self, profile: str, raw_bytes: int) -> int:
        """Estimate the payload of a transfer from the last ones of the profile that are nearest in size. Pure."""
        shares = self._coded_shares.get(profile)
        if not shares:
            return raw_bytes
        size_class = _size_class(raw_bytes)
        return round(raw_bytes * shares[min(shares, key=lambda known: abs(known - size_class))])

    def settle(
        self,
        transfer_id: TransferId,
        payload_bytes: int,
        *,
        committed_at: float | None = None,
        goodput_bytes_per_s: float | None = None,
        failure: str = "",
    ) -> None:
        """Report the outcome of a transfer, if it was asked about.

        Args:
            payload_bytes: that was sent of it, as coded.
            committed_at: when its owner said that the prefill had ended; None: it failed before.
            goodput_bytes_per_s: of its link, by now.
            failure: a NackReason, or "" when it was acknowledged.
        """
        asked = self._asked.pop(transfer_id, None)
        if asked is None:
            return
        now = self._clock.now()
        if not failure and asked.raw_bytes:
            share = payload_bytes / asked.raw_bytes
            shares, size_class = self._coded_shares.setdefault(asked.profile, {}), _size_class(asked.raw_bytes)
            before = shares.get(size_class, share)
            shares[size_class] = before + _RATIO_WEIGHT * (share - before)
        observation = TransferObservation(
            transfer_id=transfer_id,
            observed_s=now - asked.at,
            exposed_s=None if committed_at is None else max(0.0, now - committed_at),
            raw_bytes=asked.raw_bytes,
            payload_bytes=payload_bytes,
            failure=failure,
            goodput_bytes_per_s=goodput_bytes_per_s,
        )
        try:
            self._chooser.observe(observation)
        except Exception:  # as above: what it cannot learn must not keep an owner from its outcome
            _log.exception("observing %s", transfer_id)


def _size_class(raw_bytes: int) -> int:
    """Return the power of four. Pure."""
    return raw_bytes.bit_length() // 2
