"""The tables of `tandem status` and `tandem profile decisions`, on narrow pages."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.cli.decisions_view import decisions_table
from cluster.cli.status_view import status_table, transfer_line
from tandem_client import ClusterStatus, KvDecision, Placement, WorkerStatus


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
    console.print(status_table(status, "127.0.0.1:50051", "http://127.0.0.1:8000/v1"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for whole in (
        "prefill-10",
        "decode-12",
        "4194301",
        "1234567",
        "10240",
        "ready",
        "blocks",
        "http://127.0.0.1:8000/v1",
    ):
        assert whole in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert detail in " ".join(text.split())


def decision(**changes: object) -> KvDecision:
    made = KvDecision(
        prefill_worker="prefill-10", peer="decode-12", transfer_id="r/0", age_s=3599.0, profile="x8-fine",
        reason="less_lossy", quality_floor=0.975, tenant="lab", num_tokens=4096, raw_bytes=2**30,
        goodput_bytes_per_s=1.25e9, predicted_s=12.5, observed_s=13.25, wire_bytes=2**27, failure="", details={},
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_every_decision_is_a_line() -> None:
    living = decision(profile="none", predicted_s=None, observed_s=None, wire_bytes=0, tenant="")
    console = Console(width=120, file=io.StringIO())
    console.print(decisions_table([decision(), living, decision(failure="link_lost")]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    rows = [" ".join(line.split()) for line in text.splitlines() if "decode-12" in line]
    assert rows == [
        "prefill-10 > decode-12 3599 s 1048576 x8-fine 8.00 less_lossy 0.975 1250 12500.0 13250.0 lab",
        "prefill-10 > decode-12 3599 s 1048576 none - less_lossy 0.975 1250 - - -",
        "prefill-10 > decode-12 3599 s 1048576 x8-fine 8.00 less_lossy; failed: 0.975 1250 12500.0 13250.0 lab",
    ]
    assert "link_lost" in text


def test_a_line_tells_how_the_kv_went() -> None:
    sent = Placement("prefill-0", "decode-0", "", 1, 245_760, 120, 16, "x10.3", kv_lossless=False, kv_wire_bytes=24_576)
    assert transfer_line(sent) == ("KV: 120 tokens sent, 16 held; profile x10.3, lossy; 240 KiB as 24 KiB on the wire")
    assert "bit for bit" in transfer_line(replace(sent, kv_lossless=True))
    assert transfer_line(replace(sent, kv_profile="")) == "KV: nothing was transferred"
