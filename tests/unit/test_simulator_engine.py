"""The simulated engine against queueing theory and against itself, step by step."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.arrivals import poisson
from simulator.confidence import estimate
from simulator.decode_run import DecodeRun
from simulator.engine import DecodeSequence, Engine, PromptJob
from simulator.latency import DecodeLatency, PrefillLatency, StepLatency
from simulator.virtual_time import run_virtual, virtual_loop

_DECODE = DecodeLatency(StepLatency(0.010, 0.001, 1e-5), large=StepLatency(0.004, 0.002, 1e-5), large_batch=4)
_PREFILL = PrefillLatency(0.002, 1e-4, 1e-7)


def _engine() -> Engine:
    return Engine(virtual_loop(), _PREFILL, _DECODE, chunk_tokens=100, max_batch=1000, on_step=lambda: None)


# --- M/D/1 ------------------------------------------------------------------------------------------------------------


def _mean_wait_s(utilisation: float, seed: int, count: int) -> float:
    service_s = _PREFILL.prompt_s(100, 0, 100)  # a chunk of its own: no two prompts share a step
    waits: list[float] = []

    async def main() -> None:
        engine, loop = _engine(), virtual_loop()
        for arrival_s in poisson(utilisation / service_s, count, random.Random(seed)):
            await asyncio.sleep(arrival_s - loop.now())

            def start(arrived_at: float = arrival_s) -> tuple[int, int]:
                waits.append(loop.now() - arrived_at)
                return 100, 0

            engine.add_prompt(PromptJob(start, lambda tokens, at: None, lambda: None, 100))
        await asyncio.sleep(1000)

    run_virtual(main())
    assert len(waits) == count
    return sum(waits) / count


@pytest.mark.parametrize("utilisation", [0.3, 0.7])
def test_one_prefill_queue_waits_as_long_as_an_m_d_1_queue(utilisation: float) -> None:
    service_s = _PREFILL.prompt_s(100, 0, 100)
    expected_s = utilisation * service_s / (2 * (1 - utilisation))
    found = estimate([_mean_wait_s(utilisation, seed, 3000) for seed in range(8)])
    assert found.low <= expected_s <= found.high, (found, expected_s)
    assert found.half < 0.15 * expected_s  # or the interval says nothing


# --- decode in closed form --------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 200), context=st.integers(1, 500_000), num_steps=st.integers(0, 400), part=st.floats(0.0, 0.99)
)
def test_the_closed_form_of_a_run_is_the_sum_of_its_steps(
    batch: int, context: int, num_steps: int, part: float
) -> None:
    run = DecodeRun.of(_DECODE, batch, context)
    lengths = [_DECODE.step_s(batch, context + k * batch) for k in range(num_steps + 1)]
    before_s = sum(lengths[:num_steps])
    assert run.steps_s(num_steps) == pytest.approx(before_s, rel=1e-9)
    assert run.steps_until(before_s) == num_steps
    within_s = before_s + max(part, 1e-3) * lengths[num_steps]
    assert run.steps_until(within_s) == num_steps + 1


def _brute_force(sequences: list[tuple[float, int, int]]) -> list[float]:
    """Ends of (arrival, context, tokens), decoded one step at a time."""
    now, waiting = 0.0, sorted(enumerate(sequences), key=lambda item: item[1][0])
    batch: dict[int, list[int]] = {}
    ends = [0.0] * len(sequences)
    while waiting or batch:
        if not batch:
            now = max(now, waiting[0][1][0])
        while waiting and waiting[0][1][0] <= now + 1e-9:
            number, (_, context, tokens) = waiting.pop(0)
            batch[number] = [context, tokens]
        now += _DECODE.step_s(len(batch), sum(context for context, _ in batch.values()))
        for number in list(batch):
            batch[number][0] += 1
            batch[number][1] -= 1
            if batch[number][1] == 0:
                ends[number] = now
                del batch[number]
    return ends


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2000).map(lambda ms: ms / 997), st.integers(1, 3000), st.integers(1, 60)),
        min_size=1,
        max_size=12,
        unique_by=lambda item: item[0],
    )
)
def test_a_changing_batch_ends_when_step_by_step_decoding_ends(sequences: list[tuple[float, int, int]]) -> None:
    async def main() -> tuple[list[float], list[float]]:
        engine, loop = _engine(), virtual_loop()
        ends = [0.0] * len(sequences)
        gap_sums = [0.0] * len(sequences)
        joins = [0.0] * len(sequences)

        def add(number: int) -> None:
            _, context, tokens = sequences[number]

            def ended(gaps: tuple[tuple[float, int], ...]) -> None:
                ends[number] = loop.now()
                gap_sums[number] = joins[number] + sum(gap_s * count for gap_s, count in gaps)
                assert sum(count for _, count in gaps) == tokens

            def joined(first_step_s: float) -> None:
                joins[number] = loop.now()

            engine.add_sequence(DecodeSequence(context, tokens, ended, joined))

        for number, (arrival_s, _, _) in enumerate(sequences):
            loop.call_at(arrival_s, add, number)
        await asyncio.sleep(10_000)
        assert engine.num_running == engine.context_tokens == 0
        return ends, gap_sums

    ends, gap_sums = run_virtual(main())
    assert ends == pytest.approx(_brute_force(sequences), rel=1e-6)
    assert gap_sums == pytest.approx(ends, rel=1e-6)


def test_a_removed_sequence_leaves_at_the_next_boundary_and_is_not_told_of() -> None:
    async def main() -> None:
        engine = _engine()
        ended: list[str] = []
        long = DecodeSequence(100, 1000, lambda gaps: ended.append("long"))
        short = DecodeSequence(50, 30, lambda gaps: ended.append("short"))
        engine.add_sequence(long)
        engine.add_sequence(short)
        await asyncio.sleep(0.1)
        engine.remove_sequence(long)
        await asyncio.sleep(0.05)
        assert engine.num_running == 1
        assert engine.context_tokens < 100
        await asyncio.sleep(60)
        assert ended == ["short"]
        assert engine.num_running == engine.context_tokens == 0

    run_virtual(main())


def test_prompts_on_a_decoding_engine_stretch_its_steps() -> None:
    async def main() -> tuple[float, float]:
        engine, loop = _engine(), virtual_loop()
        done_at: dict[str, float] = {}
        engine.add_sequence(DecodeSequence(10, 20, lambda gaps: done_at.update(decode=loop.now())))
        job = PromptJob(lambda: (250, 0), lambda tokens, at: None, lambda: done_at.update(prompt=loop.now()), 250)
        engine.add_prompt(job)
        await asyncio.sleep(100)
        return done_at["prompt"], done_at["decode"]

    prompt_at, decode_at = run_virtual(main())
    first_step_s = _DECODE.step_s(1, 10)  # had begun when the prompt came
    chunks_s = _PREFILL.prompt_s(250, 0, 100)
    assert prompt_at == pytest.approx(first_step_s + chunks_s + sum(_DECODE.step_s(1, 11 + k) for k in range(3)))
    assert decode_at == pytest.approx(chunks_s + sum(_DECODE.step_s(1, 10 + k) for k in range(20)))


def test_a_removed_prompt_is_not_computed() -> None:
    async def main() -> None:
        engine = _engine()
        said: list[str] = []
        jobs = [
            PromptJob(lambda: (150, 0), lambda tokens, at: None, lambda name=name: said.append(name), 150)  # type: ignore[misc]
            for name in ("a", "b", "c")
        ]
        for job in jobs:
            engine.add_prompt(job)
        assert engine.queued_tokens == 450
        engine.remove_prompt(jobs[1])
        await asyncio.sleep(10)
        assert said == ["a", "c"]
        assert engine.prefill_tokens == 300

    run_virtual(main())
