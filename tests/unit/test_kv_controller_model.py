"""The latency model: what it must be whatever the numbers are, and a few of its values by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.codec import RAW
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.envelope import lower_envelope
from kv_transfer.controller.model import Situation, predict, sensitivity, situation
from tests.fakes.arms import EIGHTH, GB, MB, NONE, PIPELINE

KIB = 1024
arms = st.builds(
    lambda ratio, encode, decode, fixed: Arm("p", RAW, ratio, fixed, encode, fixed, decode, 0.98, False, 1),
    st.floats(0.9, 20.0),
    st.floats(0.0, 1e-8),
    st.floats(0.0, 1e-8),
    st.floats(0.0, 1e-3),
)
sizes = st.integers(1, 1 << 30)
rates = st.floats(1e6, 1e11)
seconds = st.floats(0.0, 5.0)
queues = st.integers(0, 1 << 30)
threads = st.integers(1, 8)


def at(size: int, rate: float, queue: int, compute_s: float, num_threads: int) -> Situation:
    return situation(
        size,
        PIPELINE.frame_bytes(size),
        rate,
        rtt_s=0.001,
        queued_bytes=queue,
        compute_s=compute_s,
        codec_threads=num_threads,
    )


@given(arms, sizes, sizes, rates, queues, seconds, threads)
def test_more_bytes_never_take_less_time(
    arm: Arm, one: int, other: int, rate: float, queue: int, compute_s: float, num_threads: int
) -> None:
    less, more = sorted((one, other))
    first = predict(arm, at(less, rate, queue, compute_s, num_threads)).total_s
    assert first <= predict(arm, at(more, rate, queue, compute_s, num_threads)).total_s * (1 + 1e-9)


@given(arms, sizes, rates, rates, queues, queues, seconds, threads)
def test_a_slower_link_or_a_longer_queue_never_takes_less_time(
    arm: Arm, size: int, rate: float, other_rate: float, queue: int, other: int, compute_s: float, num_threads: int
) -> None:
    base = predict(arm, at(size, max(rate, other_rate), min(queue, other), compute_s, num_threads)).total_s
    assert base <= predict(arm, at(size, min(rate, other_rate), min(queue, other), compute_s, num_threads)).total_s
    assert base <= predict(arm, at(size, max(rate, other_rate), max(queue, other), compute_s, num_threads)).total_s


@given(arms, sizes, rates, queues, seconds, threads)
def test_no_stage_is_faster_than_itself(
    arm: Arm, size: int, rate: float, queue: int, compute_s: float, num_threads: int
) -> None:
    where = at(size, rate, queue, compute_s, num_threads)
    times = predict(arm, where)
    slack = times.total_s * (1 + 1e-9)
    last_frame_s = (arm.encode_fixed_s + arm.decode_fixed_s) + where.rtt_s
    assert slack >= times.encode_s / num_threads
    assert slack >= times.decode_s / num_threads
    assert slack >= where.queue_s + times.wire_s
    assert slack >= compute_s + last_frame_s


@given(arms, st.integers(1, 256 * KIB), rates, seconds, threads)
def test_one_frame_is_the_serial_sum(arm: Arm, size: int, rate: float, compute_s: float, num_threads: int) -> None:
    times = predict(arm, at(size, rate, 0, compute_s, num_threads))
    encode_s = arm.encode_fixed_s + arm.encode_s_per_byte * size
    decode_s = arm.decode_fixed_s + arm.decode_s_per_byte * size
    assert times.total_s == pytest.approx(0.001 + compute_s + encode_s + size / (arm.ratio * rate) + decode_s)


@given(arms, sizes, rates, queues, seconds)
def test_overlap_saves_at_most_what_overlaps(arm: Arm, size: int, rate: float, queue: int, compute_s: float) -> None:
    where = at(size, rate, queue, compute_s, 1)
    times = predict(arm, where)
    serial = where.rtt_s + compute_s + where.queue_s + times.encode_s + times.wire_s + times.decode_s
    assert times.total_s <= serial * (1 + 1e-9)


def test_values_by_hand() -> None:
    where = situation(40 * MB, 10 * MB, 0.1 * GB, queued_bytes=20 * MB)
    assert predict(NONE, where).total_s == pytest.approx(0.2 + 0.4)
    times = predict(EIGHTH, where)  # 4 frames: 14.4 ms to encode or to decode each, 12.5 ms on the wire
    frame_s = 0.0001 + 10 * MB / (0.7 * GB)
    released = 0.2 + 10 * MB / (8 * 0.1 * GB) + frame_s + 3 * frame_s
    assert times.total_s == pytest.approx(released)
    assert times.occupancy_s == pytest.approx(4 * frame_s)


def test_a_long_prefill_hides_everything_but_the_last_frame() -> None:
    where = situation(60 * MB, 10 * MB, 1 * GB, compute_s=2.0)
    times = predict(NONE, where)
    assert times.is_hidden
    assert times.total_s == pytest.approx(2.0 + 0.01)


def test_the_codecs_are_busy_with_others_first() -> None:
    idle = situation(1 * MB, 1 * MB, 1 * GB)
    busy = situation(1 * MB, 1 * MB, 1 * GB, encode_backlog_s=0.5)
    assert predict(EIGHTH, busy).total_s == pytest.approx(predict(EIGHTH, idle).total_s + 0.5)


@pytest.mark.parametrize(("rate", "codec", "wire"), [(1e6, 0.0, 1.0), (1e12, 1.0, 0.0)])
def test_sensitivity_finds_the_bottleneck(rate: float, codec: float, wire: float) -> None:
    where = situation(60 * MB, 10 * MB, rate)
    found = sensitivity(EIGHTH, where, 1.0, 1.0, 1.0, predict(EIGHTH, where))
    assert found.codec == pytest.approx(codec, abs=0.25)  # a secant to 1.5 of a straight line: 0.5 / log 1.5 = 1.23
    assert found.wire == pytest.approx(wire, abs=0.25)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=12), st.floats(0, 100))
def test_the_envelope_has_the_lowest_line_everywhere(lines: list[tuple[float, float]], x: float) -> None:
    lines.sort(key=lambda line: -line[1])
    hull = lower_envelope(lines)
    lowest = min(intercept + slope * x for intercept, slope in lines)
    assert min(lines[idx][0] + lines[idx][1] * x for idx in hull) == pytest.approx(lowest, rel=1e-9, abs=1e-12)
    assert hull == sorted(hull)


def test_the_envelope_leaves_out_what_never_wins() -> None:
    assert lower_envelope([(0.0, 8.0), (3.0, 5.0), (4.0, 2.0), (9.0, 1.9), (8.0, 1.0)]) == [0, 2, 4]
