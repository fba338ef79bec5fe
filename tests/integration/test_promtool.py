"""Prometheus' own linter has nothing to say about what any service tells."""

import asyncio
import shutil
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from tests.fakes.cluster import fake_cluster
from tests.fakes.http import CHAT, http_client
from tests.fakes.script import PATIENCE_S
from tests.worker_pair import request, worker_pair

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (of prometheus) is not installed")


async def lint(text: bytes) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE_S):
        said, _ = await process.communicate(text)
    return process.returncode, said.decode()


async def test_it_is_a_linter() -> None:
    code, said = await lint(b"# TYPE tandem_things counter\ntandem_things 1\n")
    assert code != 0
    assert "help" in said


async def test_metrics_of_a_gateway(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        for _ in range(2):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT | {"temperature": -1})).status_code == 400
        assert await lint((await client.get("/metrics")).content) == (0, "")


async def test_metrics_of_workers() -> None:
    async with worker_pair() as pair:
        await pair.generate(request("a"))
        for worker in (pair.prefill, pair.decode):
            assert await lint(generate_latest(worker.metrics.registry)) == (0, "")
