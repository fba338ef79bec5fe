"""The demo's tables, and what must be true of its results. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.demo_traffic import WAVES
from tandem_client import Generation, Placement


@dataclass(frozen=True, slots=True)
class DemoTotals:
    """Of the whole demo. Memory is proportional set size, so that what processes share counts once."""

    up_s: float
    serving_s: float
    down_s: float
    peak_bytes: int
    num_processes: int


def request_table(results: Mapping[str, Generation]) -> Table:
    """One row per request: where its time went, what crossed between the workers, who served it."""
    table = Table(
        title="Requests (ms; TTFT = queue + route + prefill; profile of the KV transfer, * lossy; held in tokens)",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("request", no_wrap=True)
    for heading in ("prompt\ntokens", "prefix\nhits", "new\ntokens", "queue", "route", "prefill", "TTFT", "transfer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("first\ndecode", "TPOT", "wire\nKiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("profile", no_wrap=True)
    table.add_column("KV\nheld", justify="right", no_wrap=True)
    table.add_column("p > d", no_wrap=True)
    for name, result in results.items():
        usage, timing, placement = result.summary.usage, result.summary.timing, result.summary.placement
        steps = (timing.queue_s, timing.route_s, timing.prefill_s, timing.ttft_s, timing.transfer_s)
        prefill, decode = (worker.rpartition("-")[2] for worker in (placement.prefill_worker, placement.decode_worker))
        table.add_row(
            name,
            str(usage.prompt_tokens),
            str(usage.cached_tokens),
            str(usage.completion_tokens),
            *(f"{seconds * 1e3:.1f}" for seconds in (*steps, timing.first_decode_s, timing.tpot_s)),
            f"{placement.kv_wire_bytes / 1024:.0f}",
            (placement.kv_profile or "-") + ("" if placement.kv_lossless else "*"),
            str(placement.kv_tokens_held),
            f"{prefill} > {decode or '-'}",
        )
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


def _kv_moved(placements: Sequence[Placement]) -> str:
    raw_bytes = sum(placement.kv_bytes for placement in placements)
    wire_bytes = sum(placement.kv_wire_bytes for placement in placements)
    return f"{raw_bytes / 2**20:.2f} MiB between processes, as {wire_bytes / 2**20:.2f} MiB on the wire"


def problems(results: Mapping[str, Generation]) -> Sequence[str]:
    """Return every promise that the results break; none is the demo's success."""
    found = []
    for name, result in results.items():
        usage, placement = result.summary.usage, result.summary.placement
        if [token.index for token in result.tokens] != list(range(usage.completion_tokens)):
            found.append(f"{name}: token indices are not contiguous from 0")
        if placement.decode_worker and placement.kv_tokens_held + placement.kv_tokens_sent != usage.prompt_tokens:
            found.append(f"{name}: KV of the prompt is not accounted for")
        if (
            placement.decode_worker
            and placement.kv_tokens_sent
            and not (placement.kv_bytes and placement.kv_wire_bytes)
        ):
            found.append(f"{name}: KV tokens were sent, but no bytes")
        if not placement.kv_lossless:
            found.append(f"{name}: its KV came under a lossy profile, which nobody allowed")
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
