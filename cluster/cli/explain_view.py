"""What `tandem explain` shows: one decision with its candidates, or a line per decision. Pure."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tandem_client import RouteCandidate, RouteDecision

_SHOWN_CANDIDATES = 12


def decision_view(decision: RouteDecision) -> Group:
    """Show everything about one decision."""
    facts = (
        f"request {decision.request_id}, {decision.age_s:.0f} s ago: {decision.mode} ({decision.mode_reason}), "
        f"{decision.binding} binding, because {decision.reason}\n"
        f"prompt {decision.num_prompt_tokens} tokens, output expected {decision.expected_output_tokens}; "
        f"{decision.num_eligible} workers could be asked; shared state {decision.staleness_s:.2f} s old; "
        f"decided in {decision.decision_s * 1e6:.0f} us\n"
        "terms of the cost and predictions in ms:"
    )
    return Group(Text(facts), _candidates(decision), Text(_outcome(decision)))


def route_table(decisions: Sequence[RouteDecision]) -> Table:
    """Show one row per decision."""
    table = _table("request", "age", "mode", "prefill > decode", "why", "TTFT predicted", "observed", "regret")
    table.caption = "times in ms; regret: what it turned out to cost, less what the best other candidate was to cost"
    for one in decisions:
        outcome = one.outcome
        table.add_row(
            one.request_id,
            f"{one.age_s:.0f} s",
            one.mode,
            _pair(one.winner),
            outcome.failure if outcome is not None and outcome.failure else one.reason,
            _ms(one.winner.predicted_ttft_s),
            _ms(outcome.ttft_s) if outcome is not None else "-",
            _ms(outcome.regret_s) if outcome is not None else "-",
        )
    return table


def _candidates(decision: RouteDecision) -> Table:
    shown = decision.candidates[:_SHOWN_CANDIDATES]
    names = sorted({name for one in shown for name, seconds in one.terms_s.items() if seconds})
    table = _table("", "prefill > decode", "mode", "held", *names, "total", "TTFT", "TPOT")
    for one in shown:
        table.add_row(
            "*" if one == decision.winner else "",
            _pair(one),
            one.mode,
            f"{one.held_tokens}",
            *(_ms(one.terms_s.get(name, 0.0)) for name in names),
            _ms(one.total_s),
            _ms(one.predicted_ttft_s),
            _ms(one.predicted_tpot_s),
        )
    if len(decision.candidates) > len(shown):
        table.caption = f"and {len(decision.candidates) - len(shown)} dearer ones"
    return table


def _outcome(decision: RouteDecision) -> str:
    outcome = decision.outcome
    if outcome is None:
        return "no outcome: it still runs, or workers refused and it was decided anew"
    if outcome.failure:
        return f"failed: {outcome.failure}"
    return (
        f"observed in ms: TTFT {_ms(outcome.ttft_s)} ({outcome.ttft_error_s * 1e3:+.1f} against the prediction), "
        f"TPOT {_ms(outcome.tpot_s)}, exposed transfer {_ms(outcome.transfer_s)}, "
        f"regret against the best other candidate {_ms(outcome.regret_s)}"
    )


def _pair(candidate: RouteCandidate) -> str:
    return " > ".join(worker for worker in (candidate.prefill_worker, candidate.decode_worker) if worker)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        is_text = heading in ("", "request", "mode", "prefill > decode", "why")
        table.add_column(heading.removesuffix("_s"), justify="left" if is_text else "right", no_wrap=heading != "why")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
