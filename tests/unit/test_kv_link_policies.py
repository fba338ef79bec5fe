"""Small policies of links: the rate cap, the probe of a dead peer, the choice of a link to give up, the quota."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.sender.link_lru import LinkLru
from kv_transfer.sender.link_quota import LinkQuota, QuotaExceeded
from kv_transfer.sender.peer_health import PeerHealth
from kv_transfer.sender.rate_cap import RateCap

# --- rate cap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("burst_bytes", "sends", "delays"),
    [
        pytest.param(0, [(0.0, 1000)], [1.0], id="a message is paid before it leaves"),
        pytest.param(0, [(0.0, 1000), (0.0, 500)], [1.0, 1.5], id="in order"),
        pytest.param(0, [(0.0, 1000), (1.0, 1000)], [1.0, 1.0], id="as fast as the wire: no queue"),
        pytest.param(0, [(0.0, 1000), (9.0, 1000)], [1.0, 1.0], id="idle time is not saved up without a burst"),
        pytest.param(400, [(0.0, 300), (0.0, 300), (9.0, 400)], [0.0, 0.2, 0.0], id="a burst is saved up, once"),
    ],
)
def test_rate_cap(burst_bytes: int, sends: list[tuple[float, int]], delays: list[float]) -> None:
    cap = RateCap(1000.0, burst_bytes)
    assert [cap.delay_s(now, num_bytes) for now, num_bytes in sends] == pytest.approx(delays)


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 0), (-1.0, 0), (float("nan"), 0), (1.0, -1)])
def test_a_cap_that_would_never_let_anything_pass_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="must"):
        RateCap(rate, burst)


def test_a_message_that_did_not_leave_is_not_paid() -> None:
    cap = RateCap(1000.0, 0)
    assert cap.delay_s(0.0, 1000) == pytest.approx(1.0)
    assert cap.delay_s(0.0, 60_000) == pytest.approx(61.0)
    cap.withdraw(60_000)  # its transfer was aborted
    assert cap.delay_s(0.5, 1000) == pytest.approx(1.5)


def test_a_changed_cap_is_paid_at_the_new_rate() -> None:
    cap = RateCap(1000.0, 0)
    assert cap.delay_s(0.0, 2000) == pytest.approx(2.0)
    cap.change(1.0, 50_000.0)  # 1000 bytes are still owed
    assert cap.bytes_per_s == 50_000.0
    assert cap.delay_s(1.0, 1000) == pytest.approx(0.04)


@given(
    rate=st.floats(1.0, 1e9),
    burst=st.integers(0, 10**6),
    sends=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**7)), min_size=1, max_size=40),
)
def test_no_window_carries_more_than_the_rate_and_one_burst(
    rate: float, burst: int, sends: list[tuple[float, int]]
) -> None:
    cap = RateCap(rate, burst)
    now = 0.0
    left: list[tuple[float, int]] = []
    for gap, num_bytes in sends:
        now += gap
        left.append((now + cap.delay_s(now, num_bytes), num_bytes))
    times = [at for at, _ in left]
    assert times == sorted(times)
    for first in range(len(left)):
        carried = 0
        for at, num_bytes in left[first:]:
            carried += num_bytes
            allowed = burst + rate * (at - left[first][0]) + left[first][1]
            assert carried <= allowed * (1 + 1e-9) + rate * 1e-6


# --- peer health ------------------------------------------------------------------------------------------------------


def test_retries_are_after_1_s_doubling_to_60_s() -> None:
    health = PeerHealth()
    now, waits = 0.0, []
    for _ in range(8):
        assert health.may_try(now)
        health.failed(now)
        waits.append(health.retry_after_s(now))
        assert not health.may_try(now)
        now += waits[-1]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_failures_of_one_outage_count_once() -> None:
    health = PeerHealth()
    for now in (10.0, 10.1, 10.9):
        health.failed(now)
    assert health.retry_after_s(10.5) == pytest.approx(0.5)


@given(st.lists(st.floats(0, 100), max_size=40))
def test_a_try_is_never_further_away_than_the_longest_wait(gaps_s: list[float]) -> None:
    health, now = PeerHealth(), 0.0
    for gap_s in gaps_s:
        now += gap_s
        health.failed(now)
        assert not health.may_try(now)
        wait = health.retry_after_s(now)
        assert 0.0 <= wait <= 60.0 + 1e-9  # a sum of times is rounded, and so is this difference
        assert health.may_try(now + wait + 1e-9)


def test_a_wait_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="first_retry_s"):
        PeerHealth(2.0, 1.0)


# --- least recently used ----------------------------------------------------------------------------------------------


def test_nobody_has_to_go_while_there_is_room() -> None:
    lru: LinkLru[str] = LinkLru(2)
    lru.touched("a")
    assert lru.victim() is None
    assert not lru.is_full


def test_the_idle_link_that_was_used_longest_ago_goes() -> None:
    lru: LinkLru[str] = LinkLru(3)
    for peer in ("a", "b", "c"):
        lru.touched(peer)
    lru.touched("a")
    assert lru.victim() == "b"
    lru.closed("b")
    assert lru.victim() is None
    lru.touched("d")
    assert lru.victim() == "c"


def test_a_busy_link_stays_until_all_its_transfers_ended() -> None:
    lru: LinkLru[str] = LinkLru(1)
    lru.busy("a")
    lru.busy("a")
    lru.idle("a")
    assert lru.is_full
    assert lru.victim() is None
    lru.idle("a")
    assert lru.victim() == "a"


def test_a_transfer_that_ends_after_its_link_leaves_no_trace() -> None:
    lru: LinkLru[str] = LinkLru(1)
    lru.busy("a")
    lru.closed("a")
    lru.idle("a")
    assert len(lru) == 0


def test_a_cap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_links"):
        LinkLru(0)


Events = st.lists(st.tuples(st.sampled_from(["touched", "busy", "idle", "closed"]), st.integers(0, 5)), max_size=60)


@given(max_links=st.integers(1, 4), events=Events)
def test_a_victim_is_always_open_idle_and_the_oldest(max_links: int, events: list[tuple[str, int]]) -> None:
    lru: LinkLru[int] = LinkLru(max_links)
    used: dict[int, int] = {}
    num_busy: dict[int, int] = {}
    for at, (event, peer) in enumerate(events):
        getattr(lru, event)(peer)
        if event in ("touched", "busy"):
            used[peer] = at
            num_busy[peer] = num_busy.get(peer, 0) + (event == "busy")
        elif event == "idle":
            num_busy[peer] = max(0, num_busy.get(peer, 0) - 1)
        else:
            used.pop(peer, None)
            num_busy.pop(peer, None)
        idle = [open_peer for open_peer in used if not num_busy[open_peer]]
        expected = min(idle, key=used.__getitem__) if idle and len(used) >= max_links else None
        assert lru.victim() == expected
        assert len(lru) == len(used)
        assert all(open_peer in lru for open_peer in used)


# --- quota ------------------------------------------------------------------------------------------------------------


class Holder:
    """A sender thread that does as it is asked, at once."""

    def __init__(self, quota: LinkQuota, peer: str) -> None:
        self._quota = quota
        self._peer = peer

    def give_up_link(self) -> None:
        self._quota.closed(self._peer, self)


def test_a_peer_that_came_back_before_its_old_link_was_closed_is_idle_when_its_transfers_ended() -> None:
    quota = LinkQuota(1)
    old, new, other = Holder(quota, "d"), Holder(quota, "d"), Holder(quota, "e")
    quota.began("d")
    quota.open("d", old, 0.0)
    quota.began("d")  # offered to the next incarnation
    quota.ended("d")  # of the old one
    quota.open("d", new, 0.0)
    quota.closed("d", old)  # its thread took long
    with pytest.raises(QuotaExceeded):
        quota.open("e", other, 0.0)
    quota.ended("d")
    quota.open("e", other, 0.0)
