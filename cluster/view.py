"""Tables for people. Pure."""

from rich.table import Table

from tandem_client import ClusterStatus

_STYLES = {"ready": "green", "starting": "yellow", "loading": "yellow", "draining": "cyan", "stopped": "red"}


def status_table(status: ClusterStatus, address: str) -> Table:
    """Show one row per worker."""
    title = (
        f"cluster {status.cluster}: {status.model} at {address}, "
        f"{status.active_requests} requests active, {status.queued_requests} queued"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("worker", "role", "state", "epoch"):
        table.add_column(heading)
    for heading in ("pid", "running", "waiting", "free blocks", "cached", "total"):
        table.add_column(heading, justify="right")
    table.add_column("detail", overflow="fold")
    for worker in sorted(status.workers, key=lambda worker: (worker.role != "prefill", worker.worker_id)):
        state = worker.state if worker.connected or worker.state != "ready" else "unreachable"
        table.add_row(
            worker.worker_id,
            worker.role,
            f"[{_STYLES.get(state, 'red')}]{state}[/]",
            str(worker.epoch),
            str(worker.pid),
            str(worker.num_running),
            str(worker.num_waiting),
            str(worker.free_blocks),
            str(worker.cached_blocks),
            str(worker.total_blocks),
            worker.detail,
        )
    return table
