"""The Mooncake conversation trace through the index: the published hit ratios, exactly those of a plain LRU."""

import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest

from core.ids import WorkerId
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots

TRACES = Path(os.environ.get("TANDEM_TRACES", Path(__file__).resolve().parents[2].parent / "shared" / "traces"))
TRACE = TRACES / "mooncake_conversation.jsonl"
A = WorkerId("a")


@pytest.fixture(scope="module")
def prompts() -> list[tuple[bytes, ...]]:
    if not TRACE.is_file():
        pytest.skip(f"no trace at {TRACE}: set TANDEM_TRACES to the folder that has mooncake_conversation.jsonl")
    with TRACE.open(encoding="utf-8") as lines:
        return [tuple(block.to_bytes(16, "little") for block in json.loads(line)["hash_ids"]) for line in lines]


def plain_hits(prompts: list[tuple[bytes, ...]], capacity: int) -> list[int]:
    cache: OrderedDict[bytes, None] = OrderedDict()
    hits = []
    for hashes in prompts:
        hits.append(next((depth for depth, block in enumerate(hashes) if block not in cache), len(hashes)))
        for block in reversed(hashes):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


@pytest.mark.parametrize(("num_blocks", "published"), [(300_000, 36.6), (1_000, 4.5), (10_000, 21.1), (50_000, 35.5)])
def test_hit_ratios_of_the_conversation_trace(
    prompts: list[tuple[bytes, ...]], num_blocks: int, published: float
) -> None:
    index = PrefixIndex(PrefixIndex.bytes_for(num_blocks), WorkerSlots())
    hits = []
    for hashes in prompts:
        hits.append(index.match(hashes).holders().get(A, 0))
        index.store(A, hashes)
    index.check()
    assert len(index) <= index.max_blocks == num_blocks
    assert hits == plain_hits(prompts, num_blocks)
    ratio = 100 * sum(hits) / sum(map(len, prompts))
    assert ratio == pytest.approx(published, abs=0.1)
