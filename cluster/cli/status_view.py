"""Tables for people. Pure."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tandem_client import ClusterStatus, Placement, Summary, WorkerStatus

_STYLES = {"ready": "green", "starting": "yellow", "loading": "yellow", "draining": "cyan", "stopped": "red"}
_LEFT = ("worker", "role", "state", "epoch", "pid")
_COUNTS = ("run", "wait", "free", "cached", "blocks")


def status_table(status: ClusterStatus, address: str, http: str) -> Group:
    """Show one row per worker, whole on a page of 80 columns, and below them what they say of themselves.

    Args:
        http: base addresses of OpenAI's API; empty: none is known.
    """
    title = (
        f"cluster {status.cluster}: {status.model} at {address}, "
        f"{status.active_requests} requests active, {status.queued_requests} queued"
    )
    workers = sorted(status.workers, key=lambda worker: (worker.role != "prefill", worker.worker_id))
    rows = [_row(worker) for worker in workers]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate((*_LEFT, *_COUNTS)):
        width = max(len(heading), *(row[index].cell_len for row in rows), 0)
        table.add_column(heading, justify="right" if heading in _COUNTS else "left", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    served = [Text(f"OpenAI's API: {http}")] if http else []
    return Group(table, *served, *(Text(f"{worker.worker_id}: {worker.detail}") for worker in workers if worker.detail))


def transfer_line(placement: Placement) -> str:
    """Say in one line how the KV of a request went."""
    if not placement.kv_profile:
        return "KV: nothing was transferred"
    exactness = "bit for bit" if placement.kv_lossless else "lossy"
    return (
        f"KV: {placement.kv_tokens_sent} tokens sent, {placement.kv_tokens_held} held; profile {placement.kv_profile}, "
        f"{exactness}; {placement.kv_bytes / 1024:.0f} KiB as {placement.kv_wire_bytes / 1024:.0f} KiB on the wire"
    )


def placement_line(summary: Summary) -> str:
    """Say in one line who served a request, in which mode, why, and how well its first token was foreseen."""
    placed, timing = summary.placement, summary.timing
    workers = " > ".join(worker for worker in (placed.prefill_worker, placed.decode_worker) if worker)
    return (
        f"{summary.request_id}: {placed.mode} ({placed.mode_reason}) on {workers}, because {placed.reason}; "
        f"first token after {timing.ttft_s * 1e3:.1f} ms, {placed.predicted_ttft_s * 1e3:.1f} predicted; "
        f"{summary.usage.cached_tokens} of {summary.usage.prompt_tokens} prompt tokens cached"
    )


def _row(worker: WorkerStatus) -> list[Text]:
    state = worker.state if worker.connected or worker.state != "ready" else "unreachable"
    return [
        Text(worker.worker_id),
        Text(worker.role),
        Text(state, style=_STYLES.get(state, "red")),
        Text(str(worker.epoch)),
        Text(str(worker.pid)),
        Text(str(worker.num_running)),
        Text(str(worker.num_waiting)),
        Text(str(worker.free_blocks)),
        Text(str(worker.cached_blocks)),
        Text(str(worker.total_blocks)),
    ]
