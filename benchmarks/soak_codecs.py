"""The soak's chooser: the profile that the plan names, through an encoder that fails when the plan says so."""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from benchmarks.soak_faults import Fault, Plan
from benchmarks.soak_pool import Ledger
from core.ids import TransferId
from kv_transfer.choice import Choice, TransferObservation, TransferQuestion
from kv_transfer.codec import Encoded, Encoder, FramePlace
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder


class PlannedChooser:
    """Also sees to it that every question is followed by exactly one observation."""

    def __init__(self, plans: Mapping[TransferId, Plan], ledger: Ledger) -> None:
        self._plans = plans
        self._ledger = ledger
        self.pending: Counter[TransferId] = Counter()

    def choose(self, question: TransferQuestion) -> Choice:
        plan = self._plans[question.transfer_id]
        self.pending[question.transfer_id] += 1
        if self.pending[question.transfer_id] != 1:
            self._ledger.violated(f"{question.transfer_id}: the chooser was asked twice")
        encoder = ENCODERS[plan.profile]
        if plan.fault in (Fault.ENCODER_RAISES, Fault.ENCODER_LIES):
            encoder = FailingEncoder(encoder, plan, self._ledger)
        return Choice(plan.profile, encoder, None, "planned")

    def observe(self, observation: TransferObservation) -> None:
        if self.pending.pop(observation.transfer_id, 0) != 1:
            self._ledger.violated(f"{observation.transfer_id}: observed without a question")


class FailingEncoder:
    """An encoder with a defect that shows once: it raises, or states sections that it has not written."""

    def __init__(self, inner: Encoder, plan: Plan, ledger: Ledger) -> None:
        self._inner = inner
        self._plan = plan
        self._ledger = ledger
        self.codec_id = inner.codec_id
        self.is_identity = inner.is_identity
        self.is_lossless = inner.is_lossless

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return self._inner.max_payload_bytes(raw_bytes)

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        if self._plan.strikes(Fault.ENCODER_RAISES):
            self._ledger.injected(self._plan.fault)
            raise ZeroDivisionError("a defect of the encoder")
        encoded = self._inner.encode(kv, payload, place)
        if not self._plan.strikes(Fault.ENCODER_LIES):
            return encoded
        self._ledger.injected(self._plan.fault)
        lies: tuple[Encoded, ...] = (
            Encoded(encoded.params, (10**12,)),
            Encoded(b"x" * 600, encoded.section_bytes),
            Encoded(encoded.params, tuple(length + 1 for length in encoded.section_bytes)),
            Encoded(encoded.params, (1,) * 40),
            Encoded(encoded.params, ()),
        )
        return self._plan.rng.choice(lies)


ENCODERS: Mapping[str, Encoder] = {name: open_encoder(spec) for name, spec in ladder().items()}
