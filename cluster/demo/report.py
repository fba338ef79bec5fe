"""The demo's tables, and what must be true of its results. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.demo.traffic import WAVES
from tandem_client import Generation, Placement, Summary


@dataclass(frozen=True, slots=True)
class DemoTotals:
    """Of the whole demo. Memory is proportional set size, so that what processes share counts once."""

    up_s: float
    serving_s: float
    down_s: float
    peak_bytes: int
    num_processes: int


def request_table(results: Mapping[str, Generation]) -> Table:
    """One row per request: where its time went."""
    table = _table(
        "Requests (times in ms; TTFT = queue + route + prefill; foreseen: TTFT as the router predicted it)",
        ("prompt\ntokens", "prefix\nhits", "new\ntokens", "queue", "route", "prefill", "TTFT", "foreseen"),
        ("transfer", "first\ndecode", "TPOT"),
    )
    for name, result in results.items():
        usage, timing = result.summary.usage, result.summary.timing
        steps = (timing.queue_s, timing.route_s, timing.prefill_s, timing.ttft_s)
        rest = (result.summary.placement.predicted_ttft_s, timing.transfer_s, timing.first_decode_s, timing.tpot_s)
        table.add_row(
            name,
            f"{usage.prompt_tokens}",
            f"{usage.cached_tokens}",
            f"{usage.completion_tokens}",
            *(f"{seconds * 1e3:.1f}" for seconds in (*steps, *rest)),
        )
    return table


def placement_table(results: Mapping[str, Generation]) -> Table:
    """One row per request: who served it in which mode and why, and what crossed between the workers."""
    table = _table(
        "Placements (p > d: prefill and decode worker; KV in tokens; profile of its transfer, * lossy)",
        ("sent", "held", "wire\nKiB"),
        before=("p > d", "mode", "why this mode", "why these workers"),
        after=("profile",),
    )
    for name, result in results.items():
        placement = result.summary.placement
        prefill, decode = (worker.rpartition("-")[2] for worker in (placement.prefill_worker, placement.decode_worker))
        table.add_row(
            name,
            f"{prefill or '-'} > {decode or '-'}",
            " ".join(word for word in (placement.mode, placement.binding) if word),
            placement.mode_reason,
            placement.reason,
            f"{placement.kv_tokens_sent}",
            f"{placement.kv_tokens_held}",
            f"{placement.kv_wire_bytes / 1024:.0f}",
            (placement.kv_profile or "-") + ("" if placement.kv_lossless else "*"),
        )
    return table


def _table(title: str, *numbers: Sequence[str], before: Sequence[str] = (), after: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("request", *before):
        table.add_column(heading, no_wrap=True)
    for heading in (heading for group in numbers for heading in group):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in after:
        table.add_column(heading, no_wrap=True)
    return table


def totals_table(results: Mapping[str, Generation], totals: DemoTotals) -> Table:
    summaries = [result.summary for result in results.values()]
    prompt = sum(summary.usage.prompt_tokens for summary in summaries)
    new = sum(summary.usage.completion_tokens for summary in summaries)
    cached = sum(summary.usage.cached_tokens for summary in summaries)
    ttfts = sorted(summary.timing.ttft_s for summary in summaries)
    table = Table(title="Totals", title_justify="left", show_header=False)
    for what, value in (
        ("requests", f"{len(summaries)} in {len(WAVES)} waves, all of a wave at once"),
        ("modes", _modes([summary.placement for summary in summaries])),
        ("tokens", f"{prompt:,} prompt ({cached:,} from prefix caches), {new:,} generated"),
        ("throughput", f"{new / totals.serving_s:.0f} generated tokens/s over {totals.serving_s:.2f} s"),
        ("TTFT", f"median {ttfts[len(ttfts) // 2] * 1e3:.1f} ms, worst {ttfts[-1] * 1e3:.1f} ms"),
        ("KV moved", _kv_moved([summary.placement for summary in summaries])),
        ("KV not moved", f"{sum(summary.placement.kv_tokens_held for summary in summaries):,} tokens held already"),
        ("memory", f"peak {totals.peak_bytes / 2**20:,.0f} MiB (PSS) over {totals.num_processes} processes"),
        ("wall time", f"up {totals.up_s:.1f} s, serving {totals.serving_s:.1f} s, down {totals.down_s:.1f} s"),
    ):
        table.add_row(what, value)
    return table


def _modes(placements: Sequence[Placement]) -> str:
    modes = [placement.mode for placement in placements]
    return ", ".join(f"{modes.count(mode)} {mode}" for mode in sorted(set(modes)))


def _kv_moved(placements: Sequence[Placement]) -> str:
    raw_bytes = sum(placement.kv_bytes for placement in placements)
    wire_bytes = sum(placement.kv_wire_bytes for placement in placements)
    return f"{raw_bytes / 2**20:.2f} MiB between processes, as {wire_bytes / 2**20:.2f} MiB on the wire"


def problems(results: Mapping[str, Generation]) -> Sequence[str]:
    """Return every promise that the results break; none is the demo's success."""
    found = []
    for name, result in results.items():
        if [token.index for token in result.tokens] != list(range(result.summary.usage.completion_tokens)):
            found.append(f"{name}: token indices are not contiguous from 0")
        found += [f"{name}: {problem}" for problem in placement_problems(result.summary)]
    for request in (request for wave in WAVES for request in wave if request.same_as):
        ids = [[token.token_id for token in results[name].tokens] for name in (request.name, request.same_as)]
        if ids[0] != ids[1]:
            found.append(f"{request.name}: its tokens differ from those of {request.same_as}")
    summaries = [result.summary for result in results.values()]
    if not any(summary.placement.kv_bytes for summary in summaries):
        found.append("no KV crossed between workers")
    if not any(summary.usage.cached_tokens or summary.placement.kv_tokens_held for summary in summaries):
        found.append("no prefix was found in any cache")
    for role in ("prefill_worker", "decode_worker"):
        if len({getattr(summary.placement, role) for summary in summaries} - {""}) < 2:
            found.append(f"only one {role.replace('_', ' ')} was used")
    return found


def placement_problems(summary: Summary) -> Iterator[str]:
    """Yield what the placement of a request breaks of the promises of its mode."""
    placement = summary.placement
    has_prefill, has_decode = bool(placement.prefill_worker), bool(placement.decode_worker)
    is_handed_over = has_prefill and has_decode
    match placement.mode:
        case "remote_prefill":
            is_last = summary.usage.completion_tokens == 1  # then nothing is left to hand over
            if not (is_handed_over or (has_prefill and is_last)):
                yield "a remote prefill without both workers"
            if placement.binding not in ("early", "late"):
                yield "nobody says when the decode worker of a remote prefill was chosen"
        case "local_prefill":
            if has_prefill or not has_decode:
                yield "a local prefill is one decode worker's"
            if placement.mode_reason not in ("prefix_at_decode", "first_token_is_last"):
                yield "a local prefill without a prefix"
        case "colocated":
            if has_prefill is has_decode:
                yield "a colocated request is one worker's"
        case other:
            yield f"nobody knows the mode {other!r}"
    if is_handed_over:
        if placement.kv_tokens_held + placement.kv_tokens_sent != summary.usage.prompt_tokens:
            yield "KV of the prompt is not accounted for"
        if placement.kv_tokens_sent and not (placement.kv_bytes and placement.kv_wire_bytes and placement.kv_profile):
            yield "KV tokens were sent, but no bytes"
    elif placement.kv_tokens_sent or placement.kv_tokens_held or placement.kv_wire_bytes or placement.kv_profile:
        yield "KV went somewhere, though one worker did it all"
    if not is_handed_over and placement.mode != "remote_prefill" and placement.binding:
        yield "a binding without a hand-off"
    if not placement.kv_lossless:
        yield "its KV came under a lossy profile, which nobody allowed"
    if placement.predicted_ttft_s <= 0.0:
        yield "it was placed without a prediction"
