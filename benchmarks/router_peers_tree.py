"""Ray Serve's prefix tree, alone: match and insert per prompt, without a load term and without the actor around it.

Runs in the peers' environment, on prompts as JSON lines (lists of block numbers), and prints one JSON line.

    python -m benchmarks.router_peers_tree --workers 64 < prompts.jsonl
"""

import argparse
import importlib.util
import json
import os
import random
import sys
import time
from pathlib import Path

import psutil
import ray

from benchmarks.router_peers_http import block_text

_PLACE = "llm/_internal/serve/routing_policies/prefix_aware/prefix_tree.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--block-chars", type=int, default=64)
    parser.add_argument("--max-chars", type=int, help="kept per worker; without it nothing is, as is Ray's default")
    options = parser.parse_args()
    # By path: the package around it wants an inference engine to be installed.
    spec = importlib.util.spec_from_file_location("prefix_tree", Path(ray.__file__).parent / _PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = module.PrefixTree()
    names = [f"w{number}" for number in range(options.workers)]
    tree.add_tenants(names, 0.0)
    texts = ["".join(block_text(one, options.block_chars) for one in json.loads(line)) for line in sys.stdin]
    held = dict.fromkeys(names, 0)
    draw = random.Random(0)
    process = psutil.Process(os.getpid())
    rss_before = process.memory_info().rss
    times = []
    begun = time.perf_counter()
    for number, text in enumerate(texts):
        at = time.perf_counter()
        matched, tenants = tree.prefix_match(text)
        chosen = tenants[0] if tenants and len(matched) >= 0.1 * len(text) else draw.choice(names)
        tree.insert(text, chosen, float(number))
        held[chosen] += len(text)
        if options.max_chars and held[chosen] > options.max_chars:
            held[chosen] -= tree.evict_tenant_by_lru(chosen, held[chosen] - options.max_chars * 9 // 10)
        times.append(time.perf_counter() - at)
    wall_s = time.perf_counter() - begun
    times.sort()
    told = {
        "decisions_per_s": len(texts) / wall_s,
        "p50_s": times[len(times) // 2],
        "p99_s": times[int(len(times) * 0.99)],
        "rss_growth": process.memory_info().rss - rss_before,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
