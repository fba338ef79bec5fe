"""The goodput estimator against simulated wires: it is told what a sender could know, and must find the wire's rate."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.sender.link_estimate import MIN_SAMPLE_BYTES, GoodputEstimator

MIB = 1024 * 1024
MBIT = 125_000.0


@dataclass
class Wire:
    """A first-in-first-out wire with a socket in front that swallows everything at once."""

    rate: float
    latency_s: float = 0.001
    now: float = 100.0
    estimator: GoodputEstimator = field(default_factory=GoodputEstimator)
    _sent: int = 0
    _free_at: float = 0.0
    _acks: list[tuple[float, int]] = field(default_factory=list)

    def send(self, num_bytes: int, *, is_backlogged: bool = False) -> None:
        self._sent += num_bytes
        self.estimator.sent(self.now, self._sent, is_backlogged)
        self._free_at = max(self.now, self._free_at) + num_bytes / self.rate
        self._acks.append((self._free_at + self.latency_s, self._sent))

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self._acks and self._acks[0][0] <= until:
            at, cumulative = self._acks.pop(0)
            self.estimator.acknowledged(at, cumulative)
        self.now = until

    def settle(self) -> None:
        if self._acks:
            self.pass_time(max(0.0, self._acks[-1][0] - self.now))

    def stream(self, num_frames: int, num_bytes: int, window: int = 4) -> None:
        """Send with never more than `window` frames outstanding and always more to send."""
        for _ in range(num_frames):
            while len(self._acks) >= window:
                self.pass_time(max(0.0, self._acks[0][0] - self.now))
            self.send(num_bytes, is_backlogged=True)

    def transfer(self, num_bytes: int) -> None:
        self.send(num_bytes)
        self.settle()
        self.pass_time(0.05)

    @property
    def error(self) -> float:
        """By which factor the estimate is off, >= 1."""
        assert self.estimator.goodput_bytes_per_s is not None
        return math.exp(abs(math.log(self.estimator.goodput_bytes_per_s / self.rate)))


def test_nothing_is_known_before_anything_was_measured() -> None:
    estimator = GoodputEstimator()
    assert estimator.goodput_bytes_per_s is None
    assert estimator.rtt_s is None


@pytest.mark.parametrize("rate", [1 * MBIT, 10 * MBIT, 1_000 * MBIT, 50_000 * MBIT])
def test_a_busy_stream_finds_the_rate(rate: float) -> None:
    wire = Wire(rate, latency_s=1e-5)  # short enough for the window to fill the wire
    wire.stream(100, MIB)
    assert wire.error < 1.1


@pytest.mark.parametrize("num_bytes", [MIN_SAMPLE_BYTES, 100_000, 400_000])
def test_lone_small_transfers_on_a_slow_wire_find_its_rate(num_bytes: int) -> None:
    wire = Wire(10 * MBIT, latency_s=0.005)
    wire.transfer(1000)  # a small one tells the round trip
    for _ in range(5):
        wire.transfer(num_bytes)
    assert wire.error < 1.1


def test_lone_small_transfers_on_a_slow_wire_find_its_rate_without_a_round_trip() -> None:
    wire = Wire(10 * MBIT, latency_s=0.005)
    for _ in range(6):
        wire.transfer(100_000)
    assert wire.error < 1.2


@pytest.mark.parametrize("factor", [50.0, 1 / 50.0], ids=["up", "down"])
@pytest.mark.parametrize("num_bytes", [MIB, 100_000], ids=["frames", "small transfers"])
def test_a_step_is_tracked_within_a_few_acknowledgements(factor: float, num_bytes: int) -> None:
    slow = 10 * MBIT
    wire = Wire(slow if factor > 1 else slow * 50, latency_s=0.0005)
    wire.transfer(1000)
    for _ in range(10):
        wire.transfer(num_bytes)
    wire.rate *= factor
    for _ in range(5):
        wire.transfer(num_bytes)
    assert wire.error < 1.6  # the round trip that is known is that of the slow wire
    wire.transfer(1000)
    for _ in range(10):
        wire.transfer(num_bytes)
    assert wire.error < 1.25


@pytest.mark.parametrize("factor", [50.0, 1 / 50.0], ids=["up", "down"])
def test_a_step_is_tracked_while_a_long_transfer_is_under_way(factor: float) -> None:
    wire = Wire(100 * MBIT)
    wire.stream(20, MIB)
    wire.rate *= factor
    wire.stream(10, MIB)  # four of them were outstanding: six acknowledgements of the new rate
    assert wire.error < 1.3


def test_one_acknowledgement_for_a_whole_transfer_is_enough() -> None:
    wire = Wire(100 * MBIT)
    for _ in range(4):
        for _ in range(8):
            wire.send(MIB, is_backlogged=True)
        wire._acks = wire._acks[-1:]  # portions of credit are larger than the transfer: only its ACK tells
        wire.settle()
        wire.pass_time(0.1)
    assert wire.error < 1.1


def test_a_sender_that_computes_does_not_make_the_wire_look_slow() -> None:
    wire = Wire(1_000 * MBIT, latency_s=0.0005)
    wire.stream(20, MIB)
    wire.settle()
    for _ in range(30):  # parts of a prefill, each gone long before the next; acknowledged together
        for _ in range(4):
            wire.send(256 * 1024)
            wire.now += 0.05
        wire._acks = [(wire.now, wire._acks[-1][1])]
        wire.settle()
    assert wire.error < 1.2


def test_lone_messages_that_take_a_round_trip_do_not_make_the_wire_look_slow() -> None:
    wire = Wire(10_000 * MBIT, latency_s=0.02)
    wire.transfer(100)
    wire.stream(400, MIB, window=100)
    wire.settle()
    before = wire.error
    for _ in range(30):
        wire.transfer(100_000)
    assert wire.error <= before


def test_a_receiver_that_is_woken_late_does_not_make_the_wire_look_slow() -> None:
    wire = Wire(10_000 * MBIT, latency_s=0.0002)
    wire.transfer(1000)
    wire.stream(100, MIB, window=16)
    wire.settle()
    before = wire.error
    wire.latency_s = 0.005
    for _ in range(30):  # coded frames, each gone before the next one is ready
        wire.transfer(100_000)
    assert wire.error <= before


def test_small_messages_tell_the_round_trip_and_nothing_else() -> None:
    wire = Wire(1_000 * MBIT, latency_s=0.01)
    for _ in range(10):
        wire.transfer(4096)
    assert wire.estimator.goodput_bytes_per_s is None
    assert wire.estimator.rtt_s == pytest.approx(0.01, rel=0.02)


def test_the_first_transfer_of_a_link_is_not_a_sample() -> None:
    wire = Wire(1 * MBIT)
    wire.transfer(MIB)  # cold: a hundred times too slow
    assert wire.estimator.goodput_bytes_per_s is None
    wire.rate = 100 * MBIT
    wire.transfer(MIB)
    assert wire.error < 1.1


def test_a_new_link_counts_from_zero_and_keeps_what_was_learned() -> None:
    wire = Wire(100 * MBIT)
    wire.stream(10, MIB)
    wire.estimator.link_opened()
    assert wire.estimator.in_flight_bytes == 0
    assert wire.error < 1.1
    wire.estimator.acknowledged(wire.now + 1, MIB)  # of the old link, late
    wire.estimator.sent(wire.now, MIB, is_backlogged=False)
    assert wire.estimator.in_flight_bytes == MIB


def test_repeated_and_late_acknowledgements_change_nothing() -> None:
    wire = Wire(100 * MBIT)
    wire.stream(10, MIB)
    wire.settle()
    learned = wire.estimator.goodput_bytes_per_s
    for cumulative in (10 * MIB, 5 * MIB, 0, 10**15):
        wire.estimator.acknowledged(wire.now + 50, cumulative)
    assert wire.estimator.goodput_bytes_per_s == learned
    assert wire.estimator.in_flight_bytes == 0


def test_an_acknowledgement_dated_before_its_message_teaches_nothing() -> None:
    wire = Wire(100 * MBIT)
    wire.stream(10, MIB)
    wire.settle()
    learned = wire.estimator.goodput_bytes_per_s
    wire.send(MIB)
    wire.estimator.acknowledged(wire.now - 0.01, 11 * MIB)
    assert wire.estimator.goodput_bytes_per_s == learned
    assert wire.estimator.in_flight_bytes == 0


Steps = st.lists(
    st.tuples(st.floats(0, 2), st.sampled_from(["send", "ack"]), st.integers(0, 4 * MIB), st.booleans()), max_size=60
)


@given(steps=Steps)
def test_whatever_is_told_the_estimates_stay_possible(steps: list[tuple[float, str, int, bool]]) -> None:
    estimator = GoodputEstimator()
    now, sent, acknowledged = 0.0, 0, 0
    for seconds, kind, num_bytes, flag in steps:
        now += seconds
        if kind == "send":
            sent += num_bytes
            estimator.sent(now, sent, flag)
        else:
            acknowledged += num_bytes
            estimator.acknowledged(now, acknowledged)
        assert estimator.in_flight_bytes >= 0
        rate, rtt = estimator.goodput_bytes_per_s, estimator.rtt_s
        assert rate is None or (math.isfinite(rate) and rate > 0)
        assert rtt is None or (math.isfinite(rtt) and rtt >= 0)


@given(
    rate=st.floats(MBIT, 1e5 * MBIT),
    sizes=st.lists(st.integers(MIN_SAMPLE_BYTES, 8 * MIB), min_size=12, max_size=20),
)
def test_any_mix_of_lone_transfers_converges_without_latency(rate: float, sizes: list[int]) -> None:
    wire = Wire(rate, latency_s=0.0)
    for num_bytes in sizes:
        wire.transfer(num_bytes)
    assert wire.error < 1.05


@pytest.mark.parametrize("told_bytes", [0, 1])
def test_a_receiver_that_tells_nothing_costs_a_bounded_memory(told_bytes: int) -> None:
    estimator = GoodputEstimator()
    for at in range(1, 100_001):
        estimator.sent(at * 0.001, at * 1000, is_backlogged=True)
        estimator.acknowledged(at * 0.001, told_bytes)
    assert len(estimator._unacknowledged) < 20_000
    assert estimator.in_flight_bytes < 20_000 * 1000
    estimator.acknowledged(101.0, 100_000_000)
    assert estimator.in_flight_bytes == 0
