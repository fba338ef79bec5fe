"""Trivial HTTP workers and a load generator for routers that speak HTTP. Runs in the peers' environment.

    python -m benchmarks.router_peers_http workers --ports 21000-21003 --cache-blocks 50000
    python -m benchmarks.router_peers_http load --url http://127.0.0.1:20999/v1/completions < prompts.jsonl

A prompt is JSON on one line: a list of block numbers. A block is written out as a text of `--block-chars` characters
that no other block shares, so routers that look at text see the structure that the trace has.
"""

import argparse
import asyncio
import json
import logging
import sys
import time

import aiohttp
from aiohttp import web

from benchmarks.lru_worker import LruWorker, WorkerShape

_NUMBER_CHARS = 12


def block_text(number: int, num_chars: int) -> str:
    """Return the text of a block: its number first, so that two blocks differ at once."""
    head = f"{number:0{_NUMBER_CHARS}d}"
    return head + "." * (num_chars - _NUMBER_CHARS)


def blocks_of(text: str, num_chars: int) -> list[str]:
    return [text[start : start + _NUMBER_CHARS] for start in range(0, len(text), num_chars)]


def worker_app(worker: LruWorker, num_chars: int) -> web.Application:
    async def alive(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "trivial", "object": "model"}]})

    async def info(request: web.Request) -> web.Response:
        return web.json_response({"model_path": "trivial", "served_model_name": "trivial", "tp_size": 1, "dp_size": 1})

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        now = time.monotonic()
        served = worker.serve(blocks_of(body["prompt"], num_chars), now)
        await asyncio.sleep(max(0.0, served.done_at - now))
        return web.json_response({"id": "0", "object": "text_completion", "choices": [{"index": 0, "text": "x"}]})

    app = web.Application(client_max_size=64 * 2**20)
    for path in ("/health", "/health_generate"):
        app.router.add_get(path, alive)
    app.router.add_get("/v1/models", models)
    for path in ("/get_server_info", "/server_info", "/get_model_info", "/model_info"):
        app.router.add_get(path, info)
    app.router.add_post("/v1/completions", complete)
    return app


async def run_workers(options: argparse.Namespace) -> None:
    logging.disable(logging.ERROR)  # routers also knock with protocols that these workers do not speak
    shape = WorkerShape(options.cache_blocks, options.request_ms / 1e3, options.block_ms / 1e3)
    first, last = (int(port) for port in options.ports.split("-"))
    caches = [LruWorker(shape) for _ in range(first, last + 1)]
    for port, cache in enumerate(caches, first):
        runner = web.AppRunner(worker_app(cache, options.block_chars), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=512).start()
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):  # every line asks for the counts
        counts = [{"requests": one.num_requests, "blocks": one.num_blocks, "hits": one.num_hits} for one in caches]
        print(json.dumps(counts), flush=True)


async def run_load(options: argparse.Namespace) -> None:
    prompts = iter([json.loads(line) for line in sys.stdin])
    latencies: list[float] = []
    failures: dict[str, int] = {}
    connector = aiohttp.TCPConnector(limit=options.concurrency)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def client() -> None:
            for blocks in prompts:
                text = "".join(block_text(number, options.block_chars) for number in blocks)
                body = {"model": "trivial", "prompt": text, "max_tokens": 1}
                begun = time.monotonic()
                async with session.post(options.url, json=body) as response:
                    await response.read()
                    if response.status == 200:
                        latencies.append(time.monotonic() - begun)
                    else:
                        failures[str(response.status)] = failures.get(str(response.status), 0) + 1

        begun = time.monotonic()
        await asyncio.gather(*(client() for _ in range(options.concurrency)))
        wall_s = time.monotonic() - begun
    latencies.sort()
    middle = latencies[len(latencies) // 2] if latencies else None
    tail = latencies[int(len(latencies) * 0.99)] if latencies else None
    done = {"done": len(latencies), "failures": failures, "wall_s": wall_s, "p50_s": middle, "p99_s": tail}
    print(json.dumps(done), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    workers = commands.add_parser("workers")
    workers.add_argument("--ports", required=True, help="first-last")
    workers.add_argument("--cache-blocks", type=int, required=True)
    workers.add_argument("--request-ms", type=float, default=0.0)
    workers.add_argument("--block-ms", type=float, default=0.0)
    load = commands.add_parser("load")
    load.add_argument("--url", required=True)
    load.add_argument("--concurrency", type=int, default=16)
    for command in (workers, load):
        command.add_argument("--block-chars", type=int, default=64)
    options = parser.parse_args()
    asyncio.run(run_workers(options) if options.command == "workers" else run_load(options))


if __name__ == "__main__":
    main()
