"""Profiles of round numbers for the controller, and the questions that are asked about them."""

import random

from core.ids import RequestId, TransferId, WorkerId
from kv_transfer.choice import LinkView, TransferObservation, TransferQuestion, TransferTerms
from kv_transfer.codec import RAW
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.controller import ControllerPolicy
from kv_transfer.controller.policy import Pipeline

MB, GB = 1_000_000, 1e9
PIPELINE = Pipeline(frames_per_transfer=6, min_frame_bytes=256 * 1024, max_frame_bytes=16 << 20, codec_threads=2)
NONE = Arm("none", RAW, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, is_lossless=True, loss_rank=0)


def arm(name: str, rank: int, ratio: float, bytes_per_s: float, agreement_low: float) -> Arm:
    """Encoding and decoding at the same speed per core."""
    cost = 1.0 / bytes_per_s
    return Arm(name, RAW, ratio, 1e-4, cost, 1e-4, cost, agreement_low, agreement_low == 1.0, rank)


LOSSLESS = arm("lossless", 1, 1.4, 0.6 * GB, 1.0)
HALF = arm("half", 2, 2.0, 2.5 * GB, 0.995)
QUARTER = arm("quarter", 3, 4.0, 1.5 * GB, 0.985)
EIGHTH = arm("eighth", 4, 8.0, 0.7 * GB, 0.972)
ARMS = (NONE, LOSSLESS, HALF, QUARTER, EIGHTH)


def policy(arms: tuple[Arm, ...] = ARMS, config: ControllerConfig | None = None, seed: int = 1) -> ControllerPolicy:
    return ControllerPolicy(arms, config or ControllerConfig(exploration=0.0), PIPELINE, random.Random(seed))


def question(
    name: str = "t",
    *,
    raw_bytes: int = 20 * MB,
    goodput: float | None = 0.2 * GB,
    floor: float = 0.9,
    budget_s: float | None = None,
    compute_s: float = 0.0,
    queued_bytes: int = 0,
    carrier: str = "tcp",
    peer: str = "decode-0",
) -> TransferQuestion:
    return TransferQuestion(
        TransferId(name),
        RequestId(f"request of {name}"),
        WorkerId(peer),
        raw_bytes,
        raw_bytes // 1000,
        TransferTerms(floor, budget_s, "tenant", compute_s),
        LinkView(carrier, goodput, None if goodput is None else 0.0005, queued_bytes),
    )


def outcome(
    asked: TransferQuestion,
    observed_s: float,
    *,
    ratio: float,
    failure: str = "",
    exposed_s: float | None = None,
    goodput: float | None = None,
) -> TransferObservation:
    return TransferObservation(
        asked.transfer_id,
        observed_s,
        observed_s - asked.terms.compute_s if exposed_s is None else exposed_s,
        asked.raw_bytes,
        round(asked.raw_bytes / ratio),
        failure,
        goodput or asked.link.goodput_bytes_per_s,
    )
