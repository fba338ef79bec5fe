"""The table of `tandem status` on narrow pages."""

import io

import pytest
from rich.console import Console

from cluster.view import status_table
from tandem_client import ClusterStatus, WorkerStatus


def worker(name: str, detail: str = "") -> WorkerStatus:
    return WorkerStatus(
        worker_id=name, role=name.split("-")[0], epoch=1234567, state="ready", detail=detail,
        address="127.0.0.1:50051", pid=4194301, num_running=64, num_waiting=12, queued_prefill_tokens=0,
        free_blocks=10240, total_blocks=10240, cached_blocks=9999, connected=True, in_flight=3, metrics_port=0,
    )  # fmt: skip


@pytest.mark.parametrize("detail", ["", "loading weights of a checkpoint with a long name: 60 %"])
@pytest.mark.parametrize("width", [80, 120])
def test_names_and_numbers_are_whole(width: int, detail: str) -> None:
    workers = (worker("decode-12", detail), worker("prefill-10", detail))
    status = ClusterStatus("tandem", "tandem-tiny", "gateway-0", 0.1, 0, 3, workers)
    console = Console(width=width, file=io.StringIO())
    console.print(status_table(status, "127.0.0.1:50051"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for whole in ("prefill-10", "decode-12", "4194301", "1234567", "10240", "ready", "blocks"):
        assert whole in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert detail in " ".join(text.split())
