"""The waiting room: bounds, order, and a slow start after refusals."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.errors import RejectedError
from core.ids import RequestId
from router.admission import AdmissionQueue

MIN_S, MAX_S = 0.1, 1.0


def queue(*, max_requests: int = 100, max_tokens: int = 1000, seed: int = 0) -> AdmissionQueue:
    return AdmissionQueue(
        max_requests=max_requests,
        max_tokens=max_tokens,
        retry_min_s=MIN_S,
        retry_max_s=MAX_S,
        rng=random.Random(seed),
    )


def names(*texts: str) -> list[RequestId]:
    return [RequestId(text) for text in texts]


def enter(waiting: AdmissionQueue, *texts: str, tokens: int = 1) -> None:
    for name in names(*texts):
        waiting.enter(name, tokens)


def test_an_open_gate_releases_all_in_order() -> None:
    waiting = queue()
    enter(waiting, "a", "b")
    assert waiting.take(0.0) == names("a", "b")
    assert waiting.take(0.0) == []
    assert len(waiting) == 2, "released is not accepted: they count until then"
    waiting.leave(RequestId("a"), accepted=True)
    assert (len(waiting), waiting.num_tokens, waiting.num_waiting) == (1, 1, 0)


def test_bounds_count_everything_that_nobody_accepted_yet() -> None:
    waiting = queue(max_requests=2, max_tokens=10)
    enter(waiting, "a")
    waiting.take(0.0)
    enter(waiting, "b")
    with pytest.raises(RejectedError, match="2 requests") as refused:
        enter(waiting, "c")
    assert refused.value.retry_after_s > 0
    waiting.leave(RequestId("a"), accepted=True)
    with pytest.raises(RejectedError, match="10 tokens"):
        enter(waiting, "c", tokens=10)
    enter(waiting, "c", tokens=9)


def test_a_prompt_larger_than_the_bound_fits_an_empty_queue() -> None:
    waiting = queue(max_tokens=10)
    enter(waiting, "huge", tokens=99)
    with pytest.raises(RejectedError):
        enter(waiting, "b")


def test_a_refusal_by_all_closes_the_gate_and_the_first_probes_alone() -> None:
    waiting = queue()
    enter(waiting, "a", "b", "c")
    assert waiting.take(0.0) == names("a", "b", "c")
    for name in names("b", "a", "c"):
        waiting.put_back(name, 1, 0.0)
    assert waiting.take(0.0) == []
    due = waiting.next_deadline()
    assert due is not None
    assert MIN_S / 2 <= due <= MIN_S
    assert waiting.take(due) == names("a")
    assert waiting.take(due + 9) == [], "one probe at a time"
    assert waiting.next_deadline() is None
    waiting.leave(RequestId("a"), accepted=True)
    assert waiting.take(due) == names("b", "c")


def test_waits_double_up_to_the_bound_with_jitter_and_heed_a_hint() -> None:
    waiting = queue()
    enter(waiting, "a")
    now, waits = 0.0, []
    for _ in range(8):
        assert waiting.take(now) == names("a")
        waiting.put_back(RequestId("a"), 1, now)
        due = waiting.next_deadline()
        assert due is not None
        waits.append(due - now)
        now = due
    for number, wait in enumerate(waits):
        longest = min(MAX_S, MIN_S * 2**number)
        assert longest / 2 <= wait <= longest * 1.0001
    waiting.take(now)
    waiting.put_back(RequestId("a"), 1, now, retry_after_s=50.0)
    assert waiting.next_deadline() == pytest.approx(now + MAX_S)


def test_capacity_brings_the_probe_forward() -> None:
    waiting = queue()
    enter(waiting, "a")
    for now in (0.0, 1.0, 2.0, 3.0, 4.0):
        waiting.take(now)
        waiting.put_back(RequestId("a"), 1, now)
    waiting.note_capacity(4.0)
    due = waiting.next_deadline()
    assert due is not None
    assert due <= 4.0 + MIN_S + 1e-9


def test_a_request_that_lost_its_workers_comes_back_first_even_when_full() -> None:
    waiting = queue(max_requests=1)
    enter(waiting, "old")
    waiting.take(0.0)
    waiting.leave(RequestId("old"), accepted=True)
    enter(waiting, "new")
    waiting.put_back(RequestId("old"), 5, 0.0)
    assert len(waiting) == 2
    assert waiting.take(99.0) == names("old")


def test_a_probe_that_ends_lets_the_next_one_probe() -> None:
    waiting = queue()
    enter(waiting, "a", "b")
    waiting.take(0.0)
    waiting.put_back(RequestId("a"), 1, 0.0)
    waiting.put_back(RequestId("b"), 1, 0.0)
    assert waiting.take(10.0) == names("a")
    waiting.leave(RequestId("a"), accepted=False)
    assert waiting.take(10.0) == names("b")


def test_above_saturation_few_are_released_per_acceptance() -> None:
    waiting = queue(max_requests=2000, max_tokens=2000)
    everybody = [RequestId(f"{number:04d}") for number in range(1000)]
    for name in everybody:
        waiting.enter(name, 1)
    asked = waiting.take(0.0)
    assert asked == everybody, "nothing is known yet: the gate is open"
    for name in asked:
        waiting.put_back(name, 1, 0.0)
    now, num_accepted, num_released = 0.0, 0, 0
    while num_accepted < 5:  # five places in the cluster
        due = waiting.next_deadline()
        now = now if due is None else max(now, due)
        asked = waiting.take(now)
        assert asked
        num_released += len(asked)
        for name in asked:
            if num_accepted < 5:
                waiting.leave(name, accepted=True)
                num_accepted += 1
            else:
                waiting.put_back(name, 1, now)
    assert num_released <= 2 * 5 + 1
    refused_at = waiting.next_deadline()
    if refused_at is not None:
        assert len(waiting.take(refused_at)) == 1, "a refusal goes back to one question at a time"


def test_the_window_grows_by_what_is_accepted_until_the_queue_is_empty() -> None:
    waiting = queue()
    texts = [f"{number:02d}" for number in range(20)]
    enter(waiting, *texts)
    waiting.put_back(waiting.take(0.0)[0], 1, 0.0)
    for name in names(*texts[1:]):
        waiting.put_back(name, 1, 0.0)
    sizes, now = [], MAX_S
    while asked := waiting.take(now):
        sizes.append(len(asked))
        for name in asked:
            waiting.leave(name, accepted=True)
    assert sizes == [1, 2, 4, 8, 5]
    enter(waiting, *texts)
    assert len(waiting.take(now)) == 20, "empty once: unbounded again"


def test_a_late_refusal_of_the_first_rush_neither_closes_the_gate_nor_waits_in_the_window() -> None:
    waiting = queue()
    enter(waiting, "a", "b", "c")
    waiting.take(0.0)
    waiting.put_back(RequestId("a"), 1, 0.0)
    assert waiting.take(MAX_S) == names("a"), "b and c have no answer yet and do not count"
    waiting.leave(RequestId("a"), accepted=True)
    waiting.put_back(RequestId("b"), 1, MAX_S)
    waiting.put_back(RequestId("c"), 1, MAX_S)
    assert waiting.take(MAX_S) == names("b", "c")


class Room(RuleBasedStateMachine):
    """Whatever happens: bounded, first in first out, nobody lost or released twice."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = queue(max_requests=6, max_tokens=20)
        self.now = 0.0
        self.next = 0
        self.waiting: list[RequestId] = []
        self.released: list[RequestId] = []

    @rule(tokens=st.integers(1, 9))
    def enter(self, tokens: int) -> None:
        name = RequestId(f"{self.next:03d}")
        try:
            self.queue.enter(name, tokens)
        except RejectedError:
            assert len(self.queue) >= 6 or self.queue.num_tokens + tokens > 20
        else:
            self.next += 1
            self.waiting.append(name)

    @rule(seconds=st.floats(0, 0.5))
    def take(self, seconds: float) -> None:
        self.now += seconds
        taken = self.queue.take(self.now)
        assert taken == self.waiting[: len(taken)]
        del self.waiting[: len(taken)]
        self.released += taken

    @rule(data=st.data(), accepted=st.booleans())
    def settle(self, data: st.DataObject, accepted: bool) -> None:
        if not self.released:
            return
        name = data.draw(st.sampled_from(self.released))
        self.released.remove(name)
        if accepted:
            self.queue.leave(name, accepted=True)
        else:
            self.queue.put_back(name, 1, self.now)
            self.waiting = sorted([*self.waiting, name])

    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        if self.waiting:
            name = data.draw(st.sampled_from(self.waiting))
            self.waiting.remove(name)
            self.queue.leave(name, accepted=False)

    @rule()
    def nobody_waits_for_ever(self) -> None:
        if self.waiting and not self.released:
            due = self.queue.next_deadline()
            self.now = max(self.now, due or 0.0)
            self.take(0.0)
            assert self.released

    @invariant()
    def counts(self) -> None:
        assert len(self.queue) == len(self.waiting) + len(self.released) <= 6
        assert self.queue.num_waiting == len(self.waiting)


Room.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestRoom = Room.TestCase
