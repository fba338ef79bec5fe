"""The gateway over real gRPC in front of fake workers: what a client is streamed when all goes well."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.request import Finish, FinishReason
from protos import inference_pb2 as pb
from tests.fakes.checkpoint import write_checkpoint
from tests.fakes.cluster import collect, fake_cluster, text_request
from tests.fakes.worker import Reply


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


async def test_streams_every_token_once_with_usage_timing_and_placement(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        got = await collect(cluster.inference.Generate(text_request("hello", max_tokens=5, request_id="r-1")))
    assert got.text == "abcde"
    assert got.indices == [0, 1, 2, 3, 4]
    assert got.started is not None
    assert (got.started.request_id, got.started.model, got.started.prompt_tokens) == ("r-1", "fake", 5)
    assert got.finished.reason == pb.FINISH_REASON_LENGTH
    assert (got.finished.usage.prompt_tokens, got.finished.usage.completion_tokens) == (5, 5)
    placement, timing = got.finished.placement, got.finished.timing
    assert (placement.prefill_worker, placement.decode_worker, placement.attempts) == ("p0", "d0", 1)
    assert (placement.kv_tokens_sent, placement.kv_bytes, placement.kv_profile) == (5, 5 * 1024, "none")
    assert timing.queue_s + timing.route_s + timing.prefill_s == pytest.approx(timing.ttft_s)
    assert 0 < timing.ttft_s <= timing.total_s
    assert (timing.transfer_s, timing.first_decode_s) == (0.003, 0.004)
