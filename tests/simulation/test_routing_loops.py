"""The policy in small closed loops with its own consequences: it neither herds nor swings, and follows prefixes."""

import heapq
import statistics
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from core.ids import WorkerId
from tests.routing_world import World, load_report

REMOTE: dict[str, Any] = {"modes": ["remote_prefill"], "late_binding": False}
PREFILL_S, DECODE_S, ARRIVAL_S, REPORT_S = 4.0, 4.0, 0.25, 0.5
DECODES = ("d0", "d1", "d2", "d3")


class _DecodeLoop:
    """Long prompts on many prefill workers, four decode workers that report what runs, and nothing of what will."""

    def __init__(self, **config: Any) -> None:
        self.world = World(*[f"p{idx}" for idx in range(40)], *DECODES, **REMOTE, **config)
        self.world.table.rows["prefill_a"] = PREFILL_S
        self.batch = Counter[str]()
        self.history: list[dict[str, int]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._sequence = 1

    def run(self, until_s: float) -> None:
        start = self.world.clock.at
        self._at(start, self._arrive)
        self._at(start, self._report)
        while self._events and self._events[0][0] < start + until_s:
            self.world.clock.at, _, event = heapq.heappop(self._events)
            event()

    def _at(self, when: float, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, event))

    def _arrive(self) -> None:
        now, work_id = self.world.clock.at, f"w{self._number}"
        decision = self.world.place(self.world.query(expected_output_tokens=250))
        prefill, decode = decision.prefill, decision.decode
        assert prefill is not None
        assert decode is not None
        self.world.credit.place(work_id, decision, now)

        def join() -> None:
            self.batch[decode] += 1
            self.world.credit.drop(prefill, work_id)
            self.world.credit.accepted(decode, work_id)
            self.world.credit.landed(decode, work_id)

        def leave() -> None:
            self.batch[decode] -= 1

        self._at(now + PREFILL_S, join)
        self._at(now + PREFILL_S + DECODE_S, leave)
        self._at(now + ARRIVAL_S, self._arrive)

    def _report(self) -> None:
        self._sequence += 1
        for name in DECODES:
            running = self.batch[name]
            load = load_report(self._sequence, num_running=running, context_tokens=1000 * running)
            self.world.table.report(WorkerId(name), load, self.world.clock.at)
            self.world.credit.reported(WorkerId(name))
        self.history.append({name: self.batch[name] for name in DECODES})
        self._at(self.world.clock.at + REPORT_S, self._report)

    def swing(self) -> float:
        """Mean difference between the fullest and the emptiest decode worker, once the loop runs."""
        settled = self.history[len(self.history) // 3 :]
        return statistics.fmean(max(one.values()) - min(one.values()) for one in settled)


def test_the_decode_pool_swings_by_what_runs_now_and_not_by_what_will() -> None:
    """Sixteen requests run at a time, four on each worker when all is well; prompts take as long as answers."""
    by_reports_alone = _DecodeLoop(ignored_terms=["credit", "forecast"])
    by_forecast = _DecodeLoop()
    for loop in (by_reports_alone, by_forecast):
        loop.run(60.0)
        assert 14 <= sum(loop.history[-1].values()) <= 18
    assert by_reports_alone.swing() > 6.0, "all of four seconds' prompts follow the emptiest of now"
    assert by_forecast.swing() < 2.0
    by_forecast.world.table.check()


class _PrefixLoop:
    """A system prompt that all share, or a context of one session each, and what the workers come to hold."""

    def __init__(self, holders: dict[str, set[str]] | None = None, **config: Any) -> None:
        self.world = World(*[f"p{idx}" for idx in range(8)], "d0", **REMOTE, **config)
        self._holders = holders or {}
        self._busy = deque[tuple[float, WorkerId, str]]()
        self._number = 0

    def ask(self, context: str, hot: tuple[int, float]) -> str:
        """One prompt of 1,000 tokens, 960 of them the context; the next comes after about 50 ms."""
        world, now = self.world, self.world.clock.at
        while self._busy and self._busy[0][0] <= now:
            _, worker_id, work_id = self._busy.popleft()
            world.credit.drop(worker_id, work_id)
        holders = self._holders.setdefault(context, set())
        decision = world.place(world.query(held=dict.fromkeys(holders, 960), hot=hot))
        assert decision.prefill is not None
        self._number += 1
        work_id = f"w{self._number}"
        world.credit.place(work_id, decision, now)
        world.credit.drop(WorkerId("d0"), work_id)
        self._busy.append((now + decision.winner.ready_in_s, decision.prefill, work_id))
        self._busy = deque(sorted(self._busy))
        holders.add(decision.prefill)
        world.clock.at += world.rng.expovariate(20.0)
        return decision.prefill


def test_a_prompt_that_all_share_spreads_over_the_pool() -> None:
    """One worker could serve it alone, and would: by the price of one use alone another copy does not pay."""
    hot, blind = _PrefixLoop({"system": {"p0"}}), _PrefixLoop({"system": {"p0"}}, ignored_terms=["hot"])
    spread = Counter(hot.ask("system", (960, 200.0)) for _ in range(150))
    herd = Counter(blind.ask("system", (960, 200.0)) for _ in range(150))
    assert len(spread) >= 3
    assert max(spread.values()) < 75
    assert set(herd) == {"p0"}


def test_what_is_private_stays_where_it_is() -> None:
    loop = _PrefixLoop()
    homes: dict[str, set[str]] = {}
    for _ in range(40):
        for session in range(8):
            homes.setdefault(f"s{session}", set()).add(loop.ask(f"s{session}", (0, 0.0)))
    assert sum(len(workers) for workers in homes.values()) <= 12, "of 64 if each went anywhere"
    assert len(set().union(*homes.values())) >= 4, "and they do not all share one home"
