"""The waiting room as a whole: bounds, order, and a slow start after refusals."""

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.errors import RejectedError, RejectReason
from core.ids import RequestId
from core.service_class import ServiceClass
from router.admission.claims import Amount, Claim
from router.admission.queue import AdmissionQueue, QueueRules

MIN_S, MAX_S = 0.1, 1.0
RULES = QueueRules(
    bounds=Amount(100, 1000, 100_000),
    reserved_ratio=0.0,
    aging_s=10.0,
    max_slack_s=60.0,
    output_token_weight=2.0,
    rate_window_s=10.0,
    max_retry_after_s=60.0,
    retry_min_s=MIN_S,
    retry_max_s=MAX_S,
    shares={},
    default_share=1.0,
)


def queue(*, seed: int = 0, **changes: object) -> AdmissionQueue:
    return AdmissionQueue(replace(RULES, **changes), random.Random(seed))  # type: ignore[arg-type]


def claim(
    name: str,
    tokens: int = 1,
    service_class: ServiceClass = ServiceClass.INTERACTIVE,
    *,
    tenant: str = "",
    at: float = 0.0,
) -> Claim:
    return Claim(RequestId(name), tenant, service_class, 0, None, at, tokens, 100, 0)


def names(*texts: str) -> list[RequestId]:
    return [RequestId(text) for text in texts]


def enter(waiting: AdmissionQueue, *texts: str, tokens: int = 1) -> None:
    for text in texts:
        assert waiting.enter(claim(text, tokens), 0.0) == []


def put_back(waiting: AdmissionQueue, name: str, now: float, retry_after_s: float = 0.0) -> None:
    waiting.put_back(claim(name), now, retry_after_s)


def test_an_open_gate_releases_all_in_order() -> None:
    waiting = queue()
    enter(waiting, "a", "b")
    assert waiting.take(0.0) == names("a", "b")
    assert waiting.take(0.0) == []
    assert len(waiting) == 2, "released is not accepted: they count until then"
    waiting.leave(RequestId("a"), 0.0)
    assert (len(waiting), waiting.num_tokens, waiting.num_bytes, waiting.num_waiting) == (1, 1, 100, 0)


def test_bounds_count_everything_that_nobody_accepted_yet() -> None:
    waiting = queue(bounds=Amount(2, 10, 100_000))
    enter(waiting, "a")
    waiting.take(0.0)
    enter(waiting, "b")
    with pytest.raises(RejectedError, match="2 requests") as refused:
        enter(waiting, "c")
    assert refused.value.reason is RejectReason.QUEUE_FULL
    assert refused.value.retry_after_s > 0
    with pytest.raises(RejectedError, match="2 requests"):
        waiting.check_room(claim("c"))
    waiting.leave(RequestId("a"), 0.0)
    with pytest.raises(RejectedError, match="10 tokens"):
        enter(waiting, "c", tokens=10)
    enter(waiting, "c", tokens=9)


def test_bytes_are_bounded_too() -> None:
    waiting = queue(bounds=Amount(100, 1000, 250))
    enter(waiting, "a", "b")
    with pytest.raises(RejectedError, match="250 bytes"):
        enter(waiting, "c")


def test_a_prompt_larger_than_the_bound_fits_an_empty_queue() -> None:
    waiting = queue(bounds=Amount(100, 10, 100_000))
    enter(waiting, "huge", tokens=99)
    with pytest.raises(RejectedError):
        enter(waiting, "b")


def test_a_refusal_by_all_closes_the_gate_and_the_first_probes_alone() -> None:
    waiting = queue()
    enter(waiting, "a", "b", "c")
    assert waiting.take(0.0) == names("a", "b", "c")
    for name in ("b", "a", "c"):
        put_back(waiting, name, 0.0)
    assert waiting.take(0.0) == []
    due = waiting.next_deadline()
    assert due is not None
    assert MIN_S / 2 <= due <= MIN_S
    assert waiting.take(due) == names("a")
    assert waiting.take(due + 9) == [], "one probe at a time"
    assert waiting.next_deadline() is None
    waiting.leave(RequestId("a"), due + 9)
    assert waiting.take(due + 9) == names("b", "c")


def test_waits_double_up_to_the_bound_with_jitter_and_heed_a_hint() -> None:
    waiting = queue()
    enter(waiting, "a")
    now, waits = 0.0, []
    for _ in range(8):
        assert waiting.take(now) == names("a")
        put_back(waiting, "a", now)
        due = waiting.next_deadline()
        assert due is not None
        waits.append(due - now)
        now = due
    for number, wait in enumerate(waits):
        longest = min(MAX_S, MIN_S * 2**number)
        assert longest / 2 <= wait * 1.0001
        assert wait <= longest * 1.0001
    waiting.take(now)
    put_back(waiting, "a", now, retry_after_s=50.0)
    assert waiting.next_deadline() == pytest.approx(now + MAX_S)


def test_capacity_brings_the_probe_forward() -> None:
    waiting = queue()
    enter(waiting, "a")
    for now in (0.0, 1.0, 2.0, 3.0, 4.0):
        waiting.take(now)
        put_back(waiting, "a", now)
    waiting.note_capacity(4.0)
    due = waiting.next_deadline()
    assert due is not None
    assert due <= 4.0 + MIN_S + 1e-9


def test_a_request_that_lost_its_workers_comes_back_first_even_when_full() -> None:
    waiting = queue(bounds=Amount(2, 1000, 100_000))
    enter(waiting, "old", "slow")
    waiting.take(0.0)
    waiting.leave(RequestId("old"), 0.0)
    enter(waiting, "new")
    put_back(waiting, "slow", 0.0)
    put_back(waiting, "old", 0.0)
    assert len(waiting) == 3
    order = []
    for _ in range(3):
        order += waiting.take(99.0)
        waiting.end(order[-1], 99.0, 0)
    assert order == names("old", "slow", "new")


def test_a_probe_that_ends_lets_the_next_one_probe() -> None:
    waiting = queue()
    enter(waiting, "a", "b")
    waiting.take(0.0)
    put_back(waiting, "a", 0.0)
    put_back(waiting, "b", 0.0)
    assert waiting.take(10.0) == names("a")
    waiting.end(RequestId("a"), 10.0, 0)
    assert waiting.take(10.0) == names("b")


def test_above_saturation_few_are_released_per_acceptance() -> None:
    waiting = queue(bounds=Amount(2000, 2000, 10**9))
    everybody = [RequestId(f"{number:04d}") for number in range(1000)]
    enter(waiting, *everybody)
    asked = waiting.take(0.0)
    assert asked == everybody, "nothing is known yet: the gate is open"
    for name in asked:
        put_back(waiting, name, 0.0)
    now, num_accepted, num_released = 0.0, 0, 0
    while num_accepted < 5:  # five places in the cluster
        due = waiting.next_deadline()
        now = now if due is None else max(now, due)
        asked = waiting.take(now)
        assert asked
        num_released += len(asked)
        for name in asked:
            if num_accepted < 5:
                waiting.leave(name, now)
                num_accepted += 1
            else:
                put_back(waiting, name, now)
    assert num_released <= 2 * 5 + 1
    refused_at = waiting.next_deadline()
    if refused_at is not None:
        assert len(waiting.take(refused_at)) == 1, "a refusal goes back to one question at a time"


def test_the_window_grows_by_what_is_accepted_until_the_queue_is_empty() -> None:
    waiting = queue()
    texts = [f"{number:02d}" for number in range(20)]
    enter(waiting, *texts)
    for name in waiting.take(0.0):
        put_back(waiting, name, 0.0)
    sizes, now = [], MAX_S
    while asked := waiting.take(now):
        sizes.append(len(asked))
        for name in asked:
            waiting.leave(name, now)
    assert sizes == [1, 2, 4, 8, 5]
    enter(waiting, *texts)
    assert len(waiting.take(now)) == 20, "empty once: unbounded again"


def test_a_late_refusal_of_the_first_rush_neither_closes_the_gate_nor_waits_in_the_window() -> None:
    waiting = queue()
    enter(waiting, "a", "b", "c")
    waiting.take(0.0)
    put_back(waiting, "a", 0.0)
    assert waiting.take(MAX_S) == names("a"), "b and c have no answer yet and do not count"
    waiting.leave(RequestId("a"), MAX_S)
    put_back(waiting, "b", MAX_S)
    put_back(waiting, "c", MAX_S)
    assert waiting.take(MAX_S) == names("b", "c")


def test_the_wait_is_foretold_from_the_speed_under_backlog() -> None:
    waiting = queue(bounds=Amount(100, 10_000, 10**9))
    texts = [f"{number:02d}" for number in range(50)]
    enter(waiting, *texts, tokens=100)
    assert waiting.expected_wait_s(claim("x", 100), 0.0) == 0.0, "all may ask: nobody waits here"
    for second in range(100):
        waiting.take(float(second))  # idle seconds say nothing about the speed
    now = 100.0
    for name in texts[:30]:
        waiting.put_back(claim(name, 100), now)
    for name in texts[30:]:
        waiting.leave(RequestId(name), now)  # what an idle cluster took at once says nothing either
    for name in waiting.take(now):
        waiting.put_back(claim(name, 100), now)  # it is full now: the gate closes again
    assert 0 < waiting.expected_wait_s(claim("x", 100), now) <= MAX_S, "of the speed nothing is known yet"
    for _ in range(8):  # eight seconds at one request, of a hundred tokens, per second
        now += 1.0
        asked = waiting.take(now)
        waiting.leave(asked[0], now)
        for name in asked[1:]:
            waiting.put_back(claim(name, 100), now)
    left = waiting.num_tokens
    assert left == 2200
    assert waiting.expected_wait_s(claim("x", 100), now) == pytest.approx(left / 100, rel=0.1)
    with pytest.raises(RejectedError) as refused:
        waiting.enter(claim("huge", 9000), now)
    assert refused.value.retry_after_s == pytest.approx(60.0), "ninety seconds, of which sixty are told"


class Room(RuleBasedStateMachine):
    """Whatever happens: bounded, nobody lost, shed or released twice; the books agree."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = queue(bounds=Amount(6, 20, 550), reserved_ratio=0.2, aging_s=1.0)
        self.now = 0.0
        self.next = 0
        self.claims: dict[RequestId, Claim] = {}
        self.waiting: set[RequestId] = set()
        self.released: set[RequestId] = set()
        self.accepted: set[RequestId] = set()

    @rule(tokens=st.integers(1, 9), service_class=st.sampled_from(ServiceClass), tenant=st.sampled_from("abc"))
    def enter(self, tokens: int, service_class: ServiceClass, tenant: str) -> None:
        new = claim(f"{self.next:03d}", tokens, service_class, tenant=tenant, at=self.now)
        self.next += 1
        before = len(self.queue), self.queue.num_tokens
        try:
            shed = self.queue.enter(new, self.now)
        except RejectedError:
            assert (len(self.queue), self.queue.num_tokens) == before
            return
        gone = {one.request_id for one in shed}
        assert len(gone) == len(shed)
        assert gone <= self.waiting
        self.waiting -= gone
        self.claims[new.request_id] = new
        self.waiting.add(new.request_id)
        assert len(self.queue) <= 6
        assert self.queue.num_tokens <= 20 or len(self.queue) == 1
        assert self.queue.num_bytes <= 550

    @rule(seconds=st.floats(0, 0.5))
    def take(self, seconds: float) -> None:
        self.now += seconds
        taken = self.queue.take(self.now)
        assert len(set(taken)) == len(taken)
        assert set(taken) <= self.waiting
        self.waiting -= set(taken)
        self.released |= set(taken)

    @rule(data=st.data(), accepted=st.booleans())
    def settle(self, data: st.DataObject, accepted: bool) -> None:
        if not self.released:
            return
        name = data.draw(st.sampled_from(sorted(self.released)))
        self.released.remove(name)
        if accepted:
            self.queue.leave(name, self.now)
            self.accepted.add(name)
        else:
            self.queue.put_back(self.claims[name], self.now)
            self.waiting.add(name)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if self.accepted and len(self.queue) < 6:
            name = data.draw(st.sampled_from(sorted(self.accepted)))
            self.accepted.remove(name)
            self.queue.put_back(self.claims[name], self.now)
            self.waiting.add(name)
            self.queue.end(name, self.now, 0)
            self.waiting.remove(name)

    @rule(data=st.data(), output_tokens=st.integers(0, 50))
    def end(self, data: st.DataObject, output_tokens: int) -> None:
        known = sorted(self.waiting | self.released | self.accepted)
        if known:
            name = data.draw(st.sampled_from(known))
            for where in (self.waiting, self.released, self.accepted):
                where.discard(name)
            self.queue.end(name, self.now, output_tokens)

    @rule()
    def nobody_waits_for_ever(self) -> None:
        if self.waiting and not self.released:
            due = self.queue.next_deadline()
            self.now = max(self.now, due or 0.0)
            self.take(0.0)
            assert self.released

    @invariant()
    def counts(self) -> None:
        assert len(self.queue) == len(self.waiting) + len(self.released)
        assert self.queue.num_waiting == len(self.waiting)
        self.queue.check()


Room.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestRoom = Room.TestCase
