"""Whole decisions of the router on the prompts of a trace, in one process: one JSON line. See `router_decisions`.

python -m benchmarks.router_trace_decisions --trace ../shared/traces/mooncake_conversation.jsonl --workers 64
"""

import argparse
import json
import os
import random
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import psutil

from benchmarks.router_decisions import Deciding, Prompt, time_decisions

_BLOCK_TOKENS = 512


def prompts_of(path: Path, count: int) -> Iterator[Prompt]:
    """Yield the first prompts of the trace; block numbers become hashes."""
    with path.open(encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            numbers = json.loads(line)["hash_ids"]
            hashes = tuple(blake2b(number.to_bytes(8, "little"), digest_size=16).digest() for number in numbers)
            yield hashes, len(hashes) * _BLOCK_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--prompts", type=int, default=5_000)
    parser.add_argument("--cap-mib", type=int, default=64, help="of the prefix index")
    options = parser.parse_args()
    process = psutil.Process(os.getpid())
    gateway = Deciding(options.workers, _BLOCK_TOKENS, options.cap_mib, random.Random(0))
    prompts = list(prompts_of(options.trace, options.prompts))
    rss_before = process.memory_info().rss
    figures = time_decisions(gateway, prompts, options.prompts // 10)
    told = {
        "decisions_per_s": figures["decisions/s"],
        "p50_s": figures["p50 us"] / 1e6,
        "p99_s": figures["p99 us"] / 1e6,
        "rss_growth": process.memory_info().rss - rss_before,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
