"""What `tandem explain` and `--why` say."""

from dataclasses import replace

from rich.console import Console, Group
from rich.table import Table

from cluster.cli.explain_view import decision_view, route_table
from cluster.cli.status_view import placement_line
from tandem_client import FinishReason, Placement, RouteCandidate, RouteDecision, RouteOutcome, Summary, Timing, Usage

WINNER = RouteCandidate(
    "prefill-1",
    "decode-0",
    "remote_prefill",
    0.050,
    {"queue_s": 0.01, "prefill_s": 0.04, "slo_s": 0.0},
    0.05,
    0.02,
    512,
)
OTHER = replace(WINNER, prefill_worker="prefill-0", total_s=0.075, held_tokens=0)
DECISION = RouteDecision(
    request_id="r1",
    age_s=3.0,
    mode="remote_prefill",
    mode_reason="cheapest",
    reason="prefix_hit",
    binding="early",
    winner=WINNER,
    candidates=(WINNER, OTHER),
    staleness_s=0.25,
    outcome=RouteOutcome(0.055, 0.021, 0.002, 0.005, -0.02, ""),
    num_prompt_tokens=700,
    expected_output_tokens=64,
    num_eligible=4,
    decision_s=0.00005,
)


def shown(view: Group | Table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def test_a_decision_shows_its_candidates_terms_and_outcome() -> None:
    text = shown(decision_view(DECISION))
    for part in (
        "prefix_hit",
        "prefill-1 > decode-0",
        "prefill-0 > decode-0",
        "75.0",
        "512",
        "regret",
        "-20.0",
        "50 us",
    ):
        assert part in text, part
    assert "slo" not in text, "a term that is zero for all says nothing"


def test_a_decision_without_outcome_and_a_failed_one_say_so() -> None:
    assert "no outcome" in shown(decision_view(replace(DECISION, outcome=None)))
    failed = replace(DECISION, outcome=RouteOutcome(0.0, 0.0, 0.0, 0.0, 0.0, "lost worker decode-0"))
    assert "failed: lost worker decode-0" in shown(decision_view(failed))
    assert "lost worker decode-0" in shown(route_table([failed]))


def test_candidates_beyond_a_page_are_counted() -> None:
    many = replace(DECISION, candidates=(WINNER, *[replace(OTHER, total_s=0.1 + n) for n in range(30)]))
    assert "and 19 dearer ones" in shown(decision_view(many))


def test_the_line_after_a_generation_names_mode_workers_and_prediction() -> None:
    placement = Placement(
        "", "decode-1", "prefix_hit", 1, 0, 0, 0, "", mode="local_prefill", mode_reason="prefix_at_decode",
        predicted_ttft_s=0.04,
    )  # fmt: skip
    timing = Timing(0.0, 0.0, 0.03, 0.0, 0.0, 0.031, 0.01, 0.2)
    line = placement_line(Summary("r9", "tiny", 1, FinishReason.STOP, None, Usage(100, 8, 96), timing, placement))
    assert line == (
        "r9: local_prefill (prefix_at_decode) on decode-1, because prefix_hit; "
        "first token after 31.0 ms, 40.0 predicted; 96 of 100 prompt tokens cached"
    )
