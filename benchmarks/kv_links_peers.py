"""The processes of the two ends of the links benchmark, each in a network namespace of its own.

Both are slaves of the driver, line by line in JSON over stdin and stdout, which the shaped link does not carry. The
near end is a prefill worker whose engine waits instead of computing; the far end is a decode worker that only lands.
Both read the same monotonic clock (one machine), so arrival to landed needs no synchronisation.

    driver -> far    expect   requests of a run; answered when all are reserved
    driver -> near   prepare  open what a run needs and warm it up
    driver -> near   run      do it; answered when every transfer was acknowledged or has failed
    driver -> far    collect  when each landed, and how far the last one's KV is from what was sent

``python -m benchmarks.kv_links_peers near|far HOST RECORDED LIBRARY`` is started by the driver.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import torch

from benchmarks.kv_links_far import Far
from benchmarks.kv_links_near import Near
from benchmarks.kv_links_outcomes import Reply


async def serve(end: Near | Far) -> None:
    """Obey the driver until it closes stdin."""
    orders: dict[str, Callable[[Mapping[str, Any]], Awaitable[Reply]]]
    orders = (
        {"prepare": end.prepare, "run": end.run}
        if isinstance(end, Near)
        else {"expect": end.expect, "collect": end.collect}
    )
    _say(await end.start())
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        _say(await orders[order["op"]](order))
    await end.close()


def _say(reply: Reply) -> None:
    print(json.dumps(reply), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_links_peers", description=__doc__)
    parser.add_argument("role", choices=("near", "far"))
    parser.add_argument("host")
    parser.add_argument("recorded", help="KV as record_kv left it")
    parser.add_argument("library", help="auto, ladder, or the path of a library of profiles")
    args = parser.parse_args()
    torch.set_num_threads(1)

    async def live() -> None:
        await serve((Near if args.role == "near" else Far)(args.host, args.recorded, args.library))

    asyncio.run(live())


if __name__ == "__main__":
    main()
