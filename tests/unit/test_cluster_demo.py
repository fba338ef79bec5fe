"""The demo's judgement: it must find what is wrong, or its "all held" would mean nothing."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.demo.report import DemoTotals, placement_problems, placement_table, problems, request_table, totals_table
from cluster.demo.traffic import WAVES
from tandem_client import FinishReason, Generation, Placement, Summary, Timing, Token, Usage

NAMES = [request.name for wave in WAVES for request in wave]


def generation(number: int) -> Generation:
    placement = Placement(
        f"prefill-{number % 2}",
        f"decode-{number % 2}",
        "prefix",
        1,
        4096,
        8,
        2,
        "lossless",
        True,
        4224,
        mode="remote_prefill",
        mode_reason="first_token_is_last",
        binding="early",
        predicted_ttft_s=0.01,
    )
    summary = Summary("r", "m", 1, FinishReason.LENGTH, None, Usage(10, 2, 4), Timing(*[0.001] * 8), placement)
    return Generation("text", (Token(0, 5, None, ()), Token(1, 6, None, ())), summary)


def good() -> dict[str, Generation]:
    return {name: generation(number) for number, name in enumerate(NAMES)}


def placed(result: Generation, **changes: object) -> Generation:
    placement = replace(result.summary.placement, **changes)  # type: ignore[arg-type]
    return replace(result, summary=replace(result.summary, placement=placement))


def test_good_results_have_no_problem() -> None:
    assert list(problems(good())) == []


def test_enough_requests_are_concurrent() -> None:
    assert all(len(wave) >= 8 for wave in WAVES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ((Token(0, 5, None, ()), Token(2, 6, None, ())), "not contiguous"),
        ((Token(0, 5, None, ()), Token(0, 6, None, ())), "not contiguous"),
        ((Token(0, 5, None, ()),), "not contiguous"),
        ((Token(0, 5, None, ()), Token(1, 7, None, ())), "differ from those of shared-1"),
    ],
)
def test_broken_streams_are_found(tokens: tuple[Token, ...], problem: str) -> None:
    results = good()
    results["again"] = replace(results["again"], tokens=tokens)
    assert any(problem in found for found in problems(results))


def test_unsent_kv_is_found() -> None:
    assert any("not accounted" in one for one in problems(good() | {"chat": placed(generation(0), kv_tokens_sent=3)}))
    assert any("no bytes" in one for one in problems(good() | {"chat": placed(generation(0), kv_bytes=0)}))
    nothing = {name: placed(result, kv_bytes=0, kv_tokens_sent=0, kv_tokens_held=10) for name, result in good().items()}
    assert "no KV crossed between workers" in problems(nothing)


def test_lossy_kv_is_found() -> None:
    (found,) = problems(good() | {"chat": placed(generation(0), kv_lossless=False)})
    assert "lossy" in found


def test_idle_workers_are_found() -> None:
    alone = {name: placed(result, decode_worker="decode-0") for name, result in good().items()}
    assert list(problems(alone)) == ["only one decode worker was used"]


def alone(mode: str, **changes: object) -> Generation:
    """One worker did it all."""
    nothing_moved = {"kv_bytes": 0, "kv_tokens_sent": 0, "kv_tokens_held": 0, "kv_wire_bytes": 0, "kv_profile": ""}
    return placed(generation(0), **{"mode": mode, "mode_reason": "cheapest", "binding": "", **nothing_moved, **changes})


HANDED_OVER = generation(0)
LOCAL = alone("local_prefill", prefill_worker="", mode_reason="prefix_at_decode")
COLOCATED = alone("colocated", decode_worker="")
ELSEWHERE = alone("colocated", prefill_worker="")


@pytest.mark.parametrize("result", [HANDED_OVER, placed(HANDED_OVER, binding="late"), LOCAL, COLOCATED, ELSEWHERE])
def test_what_a_mode_promises_is_no_problem(result: Generation) -> None:
    assert list(placement_problems(result.summary)) == []


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (placed(HANDED_OVER, prefill_worker=""), "without both workers"),
        (placed(HANDED_OVER, decode_worker="", kv_tokens_held=0, kv_tokens_sent=0), "without both workers"),
        (placed(HANDED_OVER, binding=""), "when the decode worker"),
        (placed(HANDED_OVER, kv_profile=""), "no bytes"),
        (placed(HANDED_OVER, predicted_ttft_s=0.0), "without a prediction"),
        (placed(HANDED_OVER, mode=""), "nobody knows the mode"),
        (placed(LOCAL, prefill_worker="prefill-0"), "one decode worker's"),
        (placed(LOCAL, decode_worker=""), "one decode worker's"),
        (placed(LOCAL, mode_reason="cheapest"), "without a prefix"),
        (placed(LOCAL, kv_tokens_held=3), "though one worker did it all"),
        (placed(COLOCATED, decode_worker="decode-0"), "one worker's"),
        (placed(ELSEWHERE, decode_worker=""), "one worker's"),
        (placed(COLOCATED, kv_wire_bytes=3), "though one worker did it all"),
        (placed(COLOCATED, binding="early"), "without a hand-off"),
    ],
)
def test_what_breaks_the_promises_of_a_mode_is_found(result: Generation, problem: str) -> None:
    assert any(problem in found for found in placement_problems(result.summary))


def test_tables_fit_a_page() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(request_table(good()), placement_table(good()))
    console.print(totals_table(good(), DemoTotals(1.0, 2.0, 3.0, 2**30, 9)))
    text = console.export_text()
    assert "…" not in text
    assert "1,024 MiB" in text
    assert f"{len(NAMES)} remote_prefill" in text
