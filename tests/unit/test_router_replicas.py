"""What gateways tell each other: the message, the book of the peers, and two or more of them at one store."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import MonotonicClock
from core.errors import ProtocolError, StoreUnavailable
from core.ids import Epoch, GatewayId, WorkerId
from core.membership import LoadReport
from core.store_memory import MemoryStore
from router.replicas.aborts import AbortRounds
from router.replicas.codec import news_from_bytes, news_to_bytes
from router.replicas.config import SharingConfig
from router.replicas.draft import Draft
from router.replicas.news import AbortAnswer, AbortAsk, BindingNews, BreakerNews, CreditNews, News
from router.replicas.peers import PeerBook
from router.replicas.service import Replicas, news_stream
from tests.fakes.shared_state import FakeSharedState

P0, P1, D0 = WorkerId("p0"), WorkerId("p1"), WorkerId("d0")
A, B = GatewayId("gw-a"), GatewayId("gw-b")
PATIENCE_S = 10.0
CONFIG = SharingConfig(whole_interval_s=0.05, silent_after_s=0.4, retry_interval_s=0.02, publish_interval_s=0.001)


LOAD = LoadReport(sequence=9, num_running=2, queued_prefill_tokens=300, decode_step_s=0.02)


def credit(worker_id: WorkerId = P0, requests: int = 1, *, epoch: int = 1) -> CreditNews:
    return CreditNews(worker_id, Epoch(epoch), requests, 100 * requests, 200 * requests, 0.5 * requests)


def nothing(worker_id: WorkerId = P0, *, epoch: int = 1) -> CreditNews:
    return CreditNews(worker_id, Epoch(epoch))


# --- the message ---


def test_news_survives_the_wire() -> None:
    news = News(
        A,
        7,
        is_whole=True,
        credits=(credit(), replace(nothing(P1, epoch=4), load=LOAD)),
        bindings=(BindingNews("s1", P0, D0, 12.5), BindingNews("s2", None, D0, 0.0)),
        breakers=(BreakerNews(P1, Epoch(3), "open", 1.25),),
        aborts_asked=(AbortAsk("1", "r", "acme"), AbortAsk("2", "r2", "")),
        aborts_answered=(AbortAnswer("3", found=True), AbortAnswer("4", found=False)),
    )
    assert news_from_bytes(news_to_bytes(news)) == news
    assert news_from_bytes(news_to_bytes(News(A, 8, is_leaving=True))) == News(A, 8, is_leaving=True)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xff\xff", news_to_bytes(News(A, 0)), news_to_bytes(News(GatewayId(""), 1))]
)
def test_what_is_no_news_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        news_from_bytes(data)


def test_a_message_names_what_changed_and_reads_it_late() -> None:
    state = FakeSharedState()
    draft = Draft(A, state, AbortRounds(nobody), bindings_per_message=10)
    assert draft.is_empty
    draft.note_credit(P0)
    draft.note_credit(P1)
    draft.note_session("s")
    draft.note_session("lapsed")
    draft.note_breaker(D0)
    state.own[P0] = credit(P0, 3)
    state.bound["s"] = BindingNews("s", P0, D0, 9.0)
    news = draft.compose(is_whole=False)
    assert news == News(
        A,
        1,
        credits=(credit(P0, 3), nothing(P1)),
        bindings=(BindingNews("s", P0, D0, 9.0),),
        breakers=(BreakerNews(D0, Epoch(1), "closed"),),
    )
    assert draft.is_empty
    assert draft.compose(is_whole=False) == News(A, 2)
    assert draft.farewell() == News(A, 3, is_leaving=True)


def test_whole_messages_go_round_all_sessions_and_changed_ones_come_first() -> None:
    state = FakeSharedState()
    for n in range(5):
        state.bound[f"s{n}"] = BindingNews(f"s{n}", P0, D0, 9.0)
    state.own[P1] = credit(P1)
    state.breakers[D0] = BreakerNews(D0, Epoch(1), "open", 2.0)
    draft = Draft(A, state, AbortRounds(nobody), bindings_per_message=2)
    draft.note_session("s0")
    told = []
    for _ in range(4):
        news = draft.compose(is_whole=True)
        assert (news.credits, news.breakers) == ((credit(P1),), (state.breakers[D0],))
        told.append([one.session_id for one in news.bindings])
    assert told == [["s0", "s4"], ["s3", "s2"], ["s1", "s0"], ["s4", "s3"]]


def test_sessions_that_nobody_can_be_told_of_are_forgotten() -> None:
    draft = Draft(A, FakeSharedState(), AbortRounds(nobody), bindings_per_message=2)
    for n in range(100_000):
        draft.note_session(f"s{n}")
    assert draft.num_sessions <= 4096


def test_a_whole_message_tells_of_a_change_to_nothing_too() -> None:
    state = FakeSharedState()
    draft = Draft(A, state, AbortRounds(nobody), bindings_per_message=2)
    state.own[P0] = replace(nothing(), load=LOAD)
    draft.note_credit(P0)
    del state.own[P0]
    state.own[P1] = credit(P1)
    assert draft.compose(is_whole=True).credits == (nothing(P0), credit(P1)), "its load may be news"


def test_a_burst_of_sessions_is_told_in_pieces() -> None:
    state = FakeSharedState()
    draft = Draft(A, state, AbortRounds(nobody), bindings_per_message=2)
    for n in range(3):
        state.bound[f"s{n}"] = BindingNews(f"s{n}", P0, D0, 9.0)
        draft.note_session(f"s{n}")
    assert [one.session_id for one in draft.compose(is_whole=False).bindings] == ["s0", "s1"]
    assert not draft.is_empty
    assert [one.session_id for one in draft.compose(is_whole=False).bindings] == ["s2"]
    assert draft.is_empty


# --- the book ---


def test_peers_add_up_and_a_message_replaces_what_was_said() -> None:
    book = PeerBook(3.0)
    assert book.absorb(News(A, 1, credits=(credit(P0, 2),)), 0.0) == {P0}
    assert book.absorb(News(B, 1, credits=(credit(P0, 3), credit(P1, 1))), 0.0) == {P0, P1}
    assert book.credit(P0) == credit(P0, 5)
    assert book.absorb(News(A, 2, credits=(credit(P0, 1),)), 0.0) == {P0}
    assert book.credit(P0) == credit(P0, 4)
    assert book.absorb(News(A, 3, credits=(nothing(P0),)), 0.0) == {P0}
    assert book.credit(P0) == credit(P0, 3)
    assert book.absorb(News(B, 2, is_whole=True, credits=(credit(P1, 2),)), 0.0) == {P0, P1}
    assert book.credit(P0).is_nothing
    assert book.credit(P1) == credit(P1, 2)
    book.check()


def test_news_read_again_changes_nothing() -> None:
    book = PeerBook(3.0)
    book.absorb(News(A, 5, credits=(credit(P0, 2),)), 0.0)
    assert book.absorb(News(A, 5, credits=(credit(P0, 9),)), 1.0) is None
    assert book.absorb(News(A, 4, is_whole=True), 1.0) is None
    assert book.credit(P0) == credit(P0, 2)
    assert book.age_s(1.0) == 1.0


def test_only_the_newest_incarnation_of_a_worker_counts() -> None:
    book = PeerBook(3.0)
    book.absorb(News(A, 1, credits=(credit(P0, 2, epoch=1),)), 0.0)
    book.absorb(News(B, 1, credits=(credit(P0, 3, epoch=2),)), 0.0)
    assert book.credit(P0) == credit(P0, 3, epoch=2)


def test_the_silent_and_the_leaving_are_forgotten() -> None:
    book = PeerBook(3.0)
    book.absorb(News(A, 1, credits=(replace(credit(P0), load=LOAD),)), 0.0)
    book.absorb(News(B, 1, credits=(credit(P1),)), 2.0)
    assert book.credit(P0) == credit(P0), "the load is no credit"
    assert book.lapse(2.9) == set()
    assert book.lapse(3.0) == {P0}
    assert book.credit(P0).is_nothing
    assert len(book) == 1
    assert book.absorb(News(B, 2, is_leaving=True), 3.0) == {P1}
    assert (len(book), book.age_s(3.0)) == (0, 0.0)
    assert book.absorb(News(B, 3, is_leaving=True), 3.0) == set()


NEWS = st.builds(
    lambda gateway, whole, leaving, told: (gateway, whole, leaving, dict(told)),
    st.sampled_from([A, B]),
    st.booleans(),
    st.sampled_from([False, False, False, True]),
    st.lists(st.tuples(st.sampled_from([P0, P1, D0]), st.integers(0, 3)), max_size=3),
)


@given(st.lists(st.tuples(NEWS, st.booleans()), max_size=30))
def test_whatever_is_lost_the_next_whole_message_sets_right(
    steps: list[tuple[tuple[GatewayId, bool, bool, dict[WorkerId, int]], bool]],
) -> None:
    book = PeerBook(3.0)
    truth: dict[GatewayId, dict[WorkerId, int]] = {A: {}, B: {}}
    sequence = 0
    for (gateway, is_whole, is_leaving, told), is_lost in steps:
        sequence += 1
        truth[gateway].update(told)
        state = truth[gateway] if is_whole else told
        news = News(gateway, sequence, is_whole, tuple(credit(name, count) for name, count in state.items()))
        if is_leaving:
            truth[gateway] = {}
            news = News(gateway, sequence, is_leaving=True)
        if not is_lost:
            book.absorb(news, 0.0)
        book.check()
    for gateway in (A, B):
        sequence += 1
        whole = tuple(credit(name, count) for name, count in truth[gateway].items())
        book.absorb(News(gateway, sequence, is_whole=True, credits=whole), 0.0)
    for name in (P0, P1, D0):
        assert book.credit(name).num_requests == truth[A].get(name, 0) + truth[B].get(name, 0)


# --- several gateways at one store ---


class Member:
    """One gateway's part, and what it has heard."""

    def __init__(self, name: str, store: MemoryStore, config: SharingConfig = CONFIG) -> None:
        self.state = FakeSharedState()
        self.running: set[tuple[str, str]] = set()  # requests and their tenants
        self.asked: list[tuple[str, str]] = []
        self.replicas = Replicas(
            store, "test", GatewayId(name), MonotonicClock(), config, self.state, abort_here=self.abort
        )

    def abort(self, request_id: str, tenant: str) -> bool:
        self.asked.append((request_id, tenant))
        is_found = (request_id, tenant) in self.running
        self.running.discard((request_id, tenant))
        return is_found

    def send(self, worker_id: WorkerId, requests: int) -> None:
        """This gateway's own credit with a worker is now for so many requests."""
        self.state.own[worker_id] = credit(worker_id, requests)
        if not requests:
            del self.state.own[worker_id]
        self.replicas.note_credit(worker_id)


@asynccontextmanager
async def running(*members: Member) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(member.replicas.run()) for member in members]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(store: MemoryStore, condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; looked at again whenever somebody has published."""
    cursor = "0"
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            read = await store.read({news_stream("test"): cursor}, max_entries=1000, wait_s=1.0)
            cursor = read[news_stream("test")][-1].entry_id if read else cursor
            await asyncio.sleep(0)


async def test_credit_reaches_the_others_and_goes_again() -> None:
    store = MemoryStore()
    a, b, c = Member("gw-a", store), Member("gw-b", store), Member("gw-c", store)
    async with running(a, b, c):
        a.send(P0, 2)
        b.send(P0, 1)
        await until(store, lambda: c.state.peers.get(P0) == credit(P0, 3))
        await until(store, lambda: a.state.peers.get(P0) == credit(P0, 1))
        a.send(P0, 0)
        await until(store, lambda: c.state.peers.get(P0) == credit(P0, 1))
        await until(store, lambda: not b.state.peers)
        assert a.replicas.num_replicas == b.replicas.num_replicas == c.replicas.num_replicas == 3
        assert a.replicas.peers == {GatewayId("gw-b"), GatewayId("gw-c")}
        assert a.replicas.age_s < CONFIG.silent_after_s


async def test_what_a_worker_told_one_gateway_reaches_the_others() -> None:
    store = MemoryStore()
    a, b = Member("gw-a", store), Member("gw-b", store)
    async with running(a, b):
        a.state.own[P0] = replace(nothing(P0), load=LOAD)  # accepted, and in the load of the answer
        a.replicas.note_credit(P0)
        await until(store, lambda: b.state.loads == {P0: LOAD})
        assert not b.state.peers


async def test_sessions_and_breakers_reach_the_others() -> None:
    store = MemoryStore()
    a, b = Member("gw-a", store), Member("gw-b", store)
    binding, breaker = BindingNews("s", P0, D0, 9.0), BreakerNews(P1, Epoch(1), "open", 2.0)
    async with running(a, b):
        a.state.bound["s"] = binding
        a.replicas.note_session("s")
        a.state.breakers[P1] = breaker
        a.replicas.note_breaker(P1)
        await until(store, lambda: b.state.bound.get("s") == binding and b.state.adopted_breakers.get(P1) == breaker)


async def test_the_dead_lapse_and_the_leaving_at_once() -> None:
    store = MemoryStore()
    a, b, c = Member("gw-a", store), Member("gw-b", store), Member("gw-c", store)
    async with running(a):
        async with running(b, c):
            b.send(P0, 1)
            c.send(P1, 1)
            await until(store, lambda: a.state.peers == {P0: credit(P0), P1: credit(P1)})
        await c.replicas.leave()
        await until(store, lambda: a.state.peers == {P0: credit(P0)} and a.replicas.num_replicas == 2)
        await until(store, lambda: not a.state.peers and a.replicas.num_replicas == 1)


async def test_a_gateway_that_starts_learns_at_once_what_there_is() -> None:
    store = MemoryStore()
    slow = slowed(whole_interval_s=60.0, silent_after_s=120.0)
    a, b = Member("gw-a", store, slow), Member("gw-b", store, slow)
    a.state.bound = {f"s{n}": BindingNews(f"s{n}", P0, D0, 9.0) for n in range(50)}
    async with running(a):
        a.send(P0, 2)
        await store.read({news_stream("test"): "0"}, max_entries=1, wait_s=PATIENCE_S)
        async with running(b):
            b.send(P1, 1)
            await until(store, lambda: b.state.peers == {P0: credit(P0, 2)} and len(b.state.bound) == 50)


async def test_without_the_store_everybody_goes_on_and_comes_back() -> None:
    store = MemoryStore()
    a, b = Member("gw-a", store), Member("gw-b", store)
    async with running(a, b):
        b.send(P0, 1)
        await until(store, lambda: a.state.peers == {P0: credit(P0)})
        store.set_available(False)
        await a.state.wait_until(lambda: not a.state.peers)  # lapses by time alone
        assert a.replicas.num_replicas == 2, "nothing says that the other one is gone"
        b.send(P0, 3)
        b.send(P1, 1)
        store.set_available(True)
        await until(store, lambda: a.state.peers == {P0: credit(P0, 3), P1: credit(P1)})


async def test_foreign_bytes_in_the_stream_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    a, b = Member("gw-a", store), Member("gw-b", store)
    await store.append(news_stream("test"), b"\xff\xff", max_entries=10)
    async with running(a, b):
        a.send(P0, 1)
        await until(store, lambda: b.state.peers == {P0: credit(P0)})
    assert "is ignored" in caplog.text


# --- aborts ---


async def test_an_abort_finds_its_request_wherever_it_runs() -> None:
    store = MemoryStore()
    a, b, c = Member("gw-a", store), Member("gw-b", store), Member("gw-c", store)
    c.running.add(("r", "acme"))
    async with running(a, b, c), asyncio.timeout(PATIENCE_S):
        await until(store, lambda: all(len(one.replicas.peers) == 2 for one in (a, b, c)))
        assert not await a.replicas.abort("r", "other"), "it is another tenant's"
        assert await a.replicas.abort("r", "acme")
        assert not c.running
        assert not await b.replicas.abort("r", "acme"), "there is none any more"
        assert c.asked == [("r", "other"), ("r", "acme"), ("r", "acme")], "each question is asked once"


async def test_a_gateway_alone_asks_nobody() -> None:
    store = MemoryStore()
    a = Member("gw-a", store)
    async with running(a), asyncio.timeout(PATIENCE_S):
        assert not await a.replicas.abort("r", "")


async def test_one_that_falls_silent_is_not_waited_for_and_its_requests_ended_with_it() -> None:
    store = MemoryStore()
    a, b = Member("gw-a", store), Member("gw-b", store)
    async with running(a), asyncio.timeout(PATIENCE_S):
        async with running(b):
            await until(store, lambda: bool(a.replicas.peers))
        assert not await a.replicas.abort("r", "")
        assert not a.replicas.peers


async def test_without_the_store_nobody_can_be_asked() -> None:
    store = MemoryStore()
    a, b = Member("gw-a", store), Member("gw-b", store)
    b.running.add(("r", ""))
    async with running(a, b), asyncio.timeout(PATIENCE_S):
        b.send(P0, 1)
        await until(store, lambda: bool(a.state.peers))
        store.set_available(False)
        await a.state.wait_until(lambda: not a.state.peers)
        with pytest.raises(StoreUnavailable):
            await a.replicas.abort("r", "")
        store.set_available(True)
        await until(store, lambda: bool(a.replicas.peers))
        assert await a.replicas.abort("r", "")


def test_a_question_is_answered_once_and_the_same_however_often_it_comes() -> None:
    found: list[tuple[str, str]] = []
    rounds = AbortRounds(lambda *names: not found.append(names))  # type: ignore[func-returns-value]
    ask = AbortAsk("1", "r", "acme")
    for _ in range(3):
        rounds.absorb(B, [ask], [])
        assert not rounds.is_empty
        assert rounds.answers() == (AbortAnswer("1", found=True),)
        assert rounds.is_empty
    assert found == [("r", "acme")]


def test_a_question_is_open_until_one_has_found_it_or_all_have_answered() -> None:
    rounds = AbortRounds(nobody)
    ask = AbortAsk("1", "r", "")
    opened = rounds.begin(ask, [A, B])
    assert (rounds.is_empty, rounds.asks(), rounds.is_empty, rounds.asks()) == (False, (ask,), True, (ask,))
    rounds.absorb(A, [], [AbortAnswer("1", found=False), AbortAnswer("unknown", found=True)])
    assert not opened.settled.is_set()
    rounds.absorb(A, [], [AbortAnswer("1", found=False)])
    assert not opened.settled.is_set()
    rounds.note_peers(frozenset())
    assert opened.settled.is_set()
    assert not opened.is_found
    rounds.end(opened)
    assert rounds.asks() == ()
    first = rounds.begin(ask, [A, B])
    rounds.absorb(B, [], [AbortAnswer("1", found=True)])
    assert (first.settled.is_set(), first.is_found) == (True, True)


def nobody(_request_id: str, _tenant: str) -> bool:
    return False


def slowed(**changes: float) -> SharingConfig:
    return CONFIG.model_copy(update=changes)
