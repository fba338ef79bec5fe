"""The latency model: how long a transfer takes under an arm, in seconds, from the reservation to the acknowledgement.

Frames flow through stages: computed by the prefill, encoded, on the wire, decoded. The first frame passes all of them
one after the other; behind it the stages work at the same time, so that the rest takes as long as it takes the slowest.
With `a` the round trip, V raw bytes, r the ratio, B the goodput, Q the bytes queued ahead on the link::

    one frame:  T = a + compute + enc(V) + V/(r B) + dec(V)                 nothing overlaps
    many:       T = a + compute_1 + enc_1 + wire_1 + dec_1 + max(compute, enc/p, wire, dec/p of the rest)
    queued:     T >= a + Q/B + wire_1 + dec_1 + max(wire, dec/p of the rest)     encoding goes on while the wire is busy

Parts become available linearly while the prefill computes, hence T >= compute + what the last frame needs. p is the
number of codec threads on a side. Encode and decode are added in full: the harmonic mean that is found in the
literature halves them. Units: seconds and bytes; `ratio` is raw over coded, never the other way round.

Source: KVServe's model (reference/kv_transfer.md 1.4), serial there; the pipeline's bound is the flow shop's.
"""

import math
from typing import NamedTuple

from kv_transfer.controller.arms import Arm


class Situation(NamedTuple):
    """What all arms of one question have in common.

    Attributes:
        first_bytes, rest_bytes: raw bytes of the first frame, and of all others.
        rest_frames: how many others.
        s_per_wire_byte: 1 / goodput.
        rtt_s: of a small message.
        queue_s: until the wire is free.
        encode_backlog_s: until the codec threads are free.
        compute_s: until the prefill has computed the last part.
        codec_threads: that encode, and that decode.
    """

    first_bytes: float
    rest_bytes: float
    rest_frames: int
    s_per_wire_byte: float
    rtt_s: float = 0.0
    queue_s: float = 0.0
    encode_backlog_s: float = 0.0
    compute_s: float = 0.0
    codec_threads: int = 1


class Prediction(NamedTuple):
    """One arm's times in one situation.

    Attributes:
        total_s: all together.
        encode_s, decode_s: of all frames, in core seconds.
        wire_s: of all frames, without the queue.
        waited_s: the part of `total_s` that is the queue's: the time of what is ahead, which no arm changes.
        occupancy_s: how long the busiest shared stage works for this transfer: what others wait for.
        is_hidden: the prefill is the slowest stage: only the last frame's way is exposed.
    """

    total_s: float
    encode_s: float
    wire_s: float
    decode_s: float
    waited_s: float
    occupancy_s: float
    is_hidden: bool


def situation(
    raw_bytes: int,
    frame_bytes: int,
    goodput_bytes_per_s: float,
    *,
    rtt_s: float = 0.0,
    queued_bytes: int = 0,
    encode_backlog_s: float = 0.0,
    compute_s: float = 0.0,
    codec_threads: int = 1,
) -> Situation:
    """Cut a transfer into frames of `frame_bytes` raw bytes, the last one shorter. Pure."""
    first_bytes = min(raw_bytes, frame_bytes)
    rest_bytes = raw_bytes - first_bytes
    s_per_wire_byte = 1.0 / goodput_bytes_per_s
    return Situation(
        float(first_bytes),
        float(rest_bytes),
        -(-rest_bytes // frame_bytes),
        s_per_wire_byte,
        rtt_s,
        queued_bytes * s_per_wire_byte,
        encode_backlog_s,
        max(0.0, compute_s),
        codec_threads,
    )


def predict(
    arm: Arm, at: Situation, codec_factor: float = 1.0, wire_factor: float = 1.0, ratio_factor: float = 1.0
) -> Prediction:
    """Return the times of `arm`. Pure. The factors stretch its codec times, the link's time per byte, and its ratio."""
    first, rest, num_rest, threads = at.first_bytes, at.rest_bytes, at.rest_frames, at.codec_threads
    s_per_raw_byte = at.s_per_wire_byte * wire_factor / (arm.ratio * ratio_factor)
    encode_first = (arm.encode_fixed_s + arm.encode_s_per_byte * first) * codec_factor
    decode_first = (arm.decode_fixed_s + arm.decode_s_per_byte * first) * codec_factor
    encode_rest = (arm.encode_fixed_s * num_rest + arm.encode_s_per_byte * rest) * codec_factor
    decode_rest = (arm.decode_fixed_s * num_rest + arm.decode_s_per_byte * rest) * codec_factor
    wire_first = first * s_per_raw_byte
    wire_rest = rest * s_per_raw_byte
    compute_rest = at.compute_s * rest / (first + rest) if rest else 0.0
    compute_first = at.compute_s - compute_rest
    encode_stage = encode_rest / threads
    decode_stage = decode_rest / threads
    arriving = wire_rest if wire_rest > decode_stage else decode_stage
    slowest = encode_stage if encode_stage > arriving else arriving
    is_hidden = compute_rest > slowest
    begun = compute_first if compute_first > at.encode_backlog_s else at.encode_backlog_s
    made = begun + encode_first + (compute_rest if is_hidden else slowest)
    released = at.queue_s * wire_factor + arriving
    waited_s = released - made if released > made else 0.0
    total = at.rtt_s + wire_first + decode_first + made + waited_s
    encode_s = encode_first + encode_rest
    decode_s = decode_first + decode_rest
    wire_s = wire_first + wire_rest
    codec_stage = (encode_s if encode_s > decode_s else decode_s) / threads
    occupancy = wire_s if wire_s > codec_stage else codec_stage
    return Prediction(total, encode_s, wire_s, decode_s, waited_s, occupancy, is_hidden)


class Sensitivity(NamedTuple):
    """By what part of itself the exposed time grows when a stage's time doubles, to first order: d log E / d log x."""

    codec: float
    wire: float


_STRETCH = 1.5
_PER_LOG_STRETCH = 1.0 / math.log(_STRETCH)


def sensitivity(
    arm: Arm, at: Situation, codec_factor: float, wire_factor: float, ratio_factor: float, base: Prediction
) -> Sensitivity:
    """Return how the exposed time of `base` depends on codec and wire. Pure.

    A secant to half as much again, not the tangent: the maximum over stages has kinks, and a stage just below the
    slowest one is a suspect too when something took longer than expected.
    """
    scale = _PER_LOG_STRETCH / exposed_s(base.total_s, at.compute_s)
    codec = wire = 0.0
    if base.encode_s > 0.0 or base.decode_s > 0.0:
        codec = predict(arm, at, codec_factor * _STRETCH, wire_factor, ratio_factor).total_s - base.total_s
    wire = predict(arm, at, codec_factor, wire_factor * _STRETCH, ratio_factor).total_s - base.total_s
    return Sensitivity(codec * scale, wire * scale)


MIN_EXPOSED_S = 1e-5


def exposed_s(total_s: float, compute_s: float) -> float:
    """Return what of a transfer's time comes after the prefill; never quite nothing, since its logarithm is taken."""
    exposed = total_s - compute_s
    return exposed if exposed > MIN_EXPOSED_S else MIN_EXPOSED_S
