"""What a hand-off costs beyond moving its bytes, between two real processes, per carrier: shared memory, TCP, gloo.

Questions, each answered with all sides in one run, in turn, one JSON line per result:

- `goodput`: gather from a paged pool, checksum, send, verify, scatter into a paged pool, ACK; against a raw send of as
  many bytes from a warm contiguous buffer into a warm contiguous buffer over the same class of carrier, against the
  same buffers over the links alone (`contiguous`), and, where NIXL is installed, against a write of NIXL's. A hand-off
  does more than any of the others: it is what a prefill worker and a decode worker need.
- `exposed`: prefill end to ACK when finished (chunk, layer group) parts are sent while the prefill goes on, against
  sending everything after it. The prefill is paced: it waits as a GPU would compute, and leaves the cores alone.

Run ``python -m benchmarks.link --help``.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import create_server as create_listener

import torch

from benchmarks.link_peers import LAYOUT, MIB, WAIT_S, PagedPool, RawPair, names_of, run_far_side
from benchmarks.link_ways import NearWay
from benchmarks.nixl_peer import UCX_TLS, NixlPair
from benchmarks.setting import describe_setting
from core.clock import MonotonicClock
from core.ids import Epoch, TransferId, WorkerId
from core.membership import WorkerIdentity
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.ports import Peer
from kv_transfer.sender.sender import KvSender

CHUNK_TOKENS = 512
LAYER_GROUP = 4


class Acks:
    """Outcomes of the near side: one future per transfer, resolved with the time of its ACK."""

    def __init__(self) -> None:
        self.at: dict[TransferId, asyncio.Future[float]] = {}

    def on_acked(self, transfer_id: TransferId) -> None:
        self.at[transfer_id].set_result(time.perf_counter())

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        self.at[transfer_id].set_exception(RuntimeError(f"{transfer_id}: {reason}: {detail}"))


class Bench:
    """The near side: the prefill worker's end, and the clock."""

    def __init__(self, pair: RawPair, pool: PagedPool, config: KvTransferConfig) -> None:
        self.pair = pair
        self.acks = Acks()
        identity = WorkerIdentity(WorkerId("near"), Epoch(1), "benchmark")
        self.sender = KvSender(config, identity, LAYOUT, pool, self.acks, MonotonicClock())
        self.peer = Peer(WorkerId("far"), Epoch(1), pair.store.get("address").decode())
        self._sequence = 0

    async def offer(self, num_tokens: int) -> TransferId:
        """Have a transfer reserved, as it is by the time that a prefill has computed something."""
        self._sequence += 1
        transfer_id, request_id = names_of(self._sequence)
        self.pair.expect(self._sequence, num_tokens)
        self.acks.at[transfer_id] = asyncio.get_running_loop().create_future()
        await self.sender.offer(transfer_id, request_id, num_tokens, self.peer)
        await asyncio.sleep(0.02)  # the reservation comes back; nothing can be waited for from outside
        return transfer_id

    async def hand_off(self, num_tokens: int) -> float:
        """Return the seconds from a finished prefill to the ACK."""
        transfer_id = await self.offer(num_tokens)
        started = time.perf_counter()
        self.sender.push(transfer_id, range(LAYOUT.num_layers), range(num_tokens))
        self.sender.commit(transfer_id, 1)
        async with asyncio.timeout(WAIT_S):
            return await self.acks.at[transfer_id] - started

    def over(self, name: str, way: NearWay) -> float:
        """Return the seconds of one send over a way that is not gloo."""
        self.pair.prepare_way(name)
        started = time.perf_counter()
        self.pair.send_over(way)
        seconds = time.perf_counter() - started
        self.pair.wait_done()
        return seconds

    def raw(self) -> float:
        """Return the seconds of one raw send of gloo."""
        self.pair.prepare_raw()
        started = time.perf_counter()
        self.pair.send_raw()
        return time.perf_counter() - started

    async def exposed(self, num_tokens: int, tokens_per_s: float, *, is_pipelined: bool) -> float:
        """Return the seconds from the end of a paced prefill to the ACK."""
        transfer_id = await self.offer(num_tokens)
        ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def prefill() -> None:
            parts = list(_parts(num_tokens))
            never = threading.Event()
            begun = time.perf_counter()
            for done, (layers, tokens) in enumerate(parts, 1):
                never.wait(max(0.0, begun + done / len(parts) * num_tokens / tokens_per_s - time.perf_counter()))
                if is_pipelined:
                    self.sender.push(transfer_id, layers, tokens)
            at = time.perf_counter()
            if not is_pipelined:
                self.sender.push(transfer_id, range(LAYOUT.num_layers), range(num_tokens))
            self.sender.commit(transfer_id, 1)
            loop.call_soon_threadsafe(ended.set_result, at)

        engine = threading.Thread(target=prefill, name="engine")
        engine.start()
        async with asyncio.timeout(WAIT_S):
            acked_at = await self.acks.at[transfer_id]
        engine.join(WAIT_S)
        return acked_at - await ended


def _parts(num_tokens: int) -> Iterator[tuple[range, range]]:
    for start in range(0, num_tokens, CHUNK_TOKENS):
        tokens = range(start, min(start + CHUNK_TOKENS, num_tokens))
        for layer in range(0, LAYOUT.num_layers, LAYER_GROUP):
            yield range(layer, layer + LAYER_GROUP), tokens


async def run_near_side(
    args: argparse.Namespace, port: int, max_tokens: int, config: KvTransferConfig, emit: Callable[..., None]
) -> None:
    torch.set_num_threads(1)
    goodput_tokens = args.goodput_mib * MIB // LAYOUT.bytes_per_token
    pool = PagedPool(max_tokens, seed=1)
    pair = RawPair("near", port, goodput_tokens * LAYOUT.bytes_per_token)
    bench = Bench(pair, pool, config)
    await _goodput(bench, goodput_tokens, args, config, emit)
    await _exposed(bench, args, config, emit)
    pair.stop()
    written = pair.store.get("checksum").decode()
    assert written == pool.checksum(), "the pools differ"
    await bench.sender.close()


async def _goodput(
    bench: Bench, num_tokens: int, args: argparse.Namespace, config: KvTransferConfig, emit: Callable[..., None]
) -> None:
    """Every side once per round, in a new order each time, so that what else the machine does hits all of them."""
    ways = bench.pair.open_ways(config)
    sides: dict[str, Callable[[], float]] = {"contiguous": lambda: bench.over("carrier", ways["carrier"])}
    match config.backend:
        case "gloo":
            sides["raw"] = bench.raw
        case "tcp":
            sides["raw"] = lambda: bench.over("tcp", ways["tcp"])
        case _:
            pass  # slots are all there is to send over: contiguous is the raw send
    nixl, nixl_problem = _open_nixl(args, config)
    if nixl is not None:
        sides["nixl"] = nixl.write
    times: dict[str, list[float]] = {name: [] for name in (*sides, "hand_off")}
    for repetition in range(-args.warmup, args.repetitions):
        names = list(times)
        random.shuffle(names)
        for name in names:
            seconds = await bench.hand_off(num_tokens) if name == "hand_off" else sides[name]()
            if repetition >= 0:
                times[name].append(seconds)
    if nixl is not None:
        nixl.close()
    for way in ways.values():
        way.close()
    num_bytes = num_tokens * LAYOUT.bytes_per_token
    ours = times["hand_off"]
    raw = times.get("raw", times["contiguous"])
    emit(
        "link.goodput",
        carrier=config.backend,
        mib=num_bytes // MIB,
        slot_bytes=config.slot_bytes,
        num_slots=config.num_slots,
        credit_mib=config.credit_bytes // MIB,
        repetitions=args.repetitions,
        raw_gb_s=_rate(num_bytes, raw),
        contiguous_gb_s=_rate(num_bytes, times["contiguous"]),
        hand_off_gb_s=_rate(num_bytes, ours),
        raw_best_gb_s=round(num_bytes / min(raw) / 1e9, 3),
        contiguous_best_gb_s=round(num_bytes / min(times["contiguous"]) / 1e9, 3),
        hand_off_best_gb_s=round(num_bytes / min(ours) / 1e9, 3),
        ratio=round(statistics.median(raw) / statistics.median(ours), 3),
        ratio_best=round(min(raw) / min(ours), 3),
        ratio_of_pairs=_ratio_of_pairs(raw, ours),
        **_beside_nixl(times, num_bytes),
        nixl_problem=nixl_problem,
    )


def _open_nixl(args: argparse.Namespace, config: KvTransferConfig) -> tuple[NixlPair | None, str]:
    """Return what to compare with, or why there is nothing."""
    tls = UCX_TLS.get(config.backend)
    if args.no_nixl or tls is None:
        return None, "not asked for" if args.no_nixl else f"not compared over {config.backend}"
    pair = NixlPair(tls, args.goodput_mib)
    if pair.problem:
        pair.close()
        return None, pair.problem
    return pair, ""


def _beside_nixl(times: dict[str, list[float]], num_bytes: int) -> dict[str, float]:
    if "nixl" not in times:
        return {}
    nixl = times["nixl"]
    return {
        "nixl_gb_s": _rate(num_bytes, nixl),
        "nixl_best_gb_s": round(num_bytes / min(nixl) / 1e9, 3),
        "contiguous_against_nixl": _ratio_of_pairs(nixl, times["contiguous"]),
        "hand_off_against_nixl": _ratio_of_pairs(nixl, times["hand_off"]),
    }


def _ratio_of_pairs(theirs: list[float], ours: list[float]) -> float:
    """Return how much faster ours is, as the median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 3)


async def _exposed(bench: Bench, args: argparse.Namespace, config: KvTransferConfig, emit: Callable[..., None]) -> None:
    for mib in args.exposed_mib:
        num_tokens = mib * MIB // LAYOUT.bytes_per_token
        whole, pipelined = [], []
        for _ in range(args.exposed_repetitions):
            whole.append(await bench.exposed(num_tokens, args.tokens_per_s, is_pipelined=False))
            pipelined.append(await bench.exposed(num_tokens, args.tokens_per_s, is_pipelined=True))
        emit(
            "link.exposed",
            carrier=config.backend,
            mib=mib,
            prefill_s=round(num_tokens / args.tokens_per_s, 4),
            repetitions=args.exposed_repetitions,
            whole_after_prefill_ms=round(statistics.median(whole) * 1e3, 2),
            pipelined_ms=round(statistics.median(pipelined) * 1e3, 2),
            ratio=round(statistics.median(whole) / statistics.median(pipelined), 2),
        )


def _rate(num_bytes: int, seconds: list[float]) -> float:
    return round(num_bytes / statistics.median(seconds) / 1e9, 3)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.link", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--carrier",
        nargs="*",
        default=["shm", "tcp", "gloo"],
        choices=["shm", "tcp", "gloo", "auto"],
        help="carriers, one after the other (default shm tcp gloo)",
    )
    parser.add_argument("--no-nixl", action="store_true", help="compare with raw sends only")
    parser.add_argument("--goodput-mib", type=int, default=64, help="size of a hand-off (default 64)")
    parser.add_argument("--repetitions", type=int, default=20, help="of each side (default 20)")
    parser.add_argument("--warmup", type=int, default=3, help="repetitions that are not counted (default 3)")
    parser.add_argument("--exposed-mib", type=int, nargs="*", default=[4, 16, 64], help="sizes (default 4 16 64)")
    parser.add_argument("--exposed-repetitions", type=int, default=5, help="of each side and size (default 5)")
    parser.add_argument("--tokens-per-s", type=float, default=20_000, help="pace of the prefill (default 20000)")
    parser.add_argument("--slot-mib", type=float, help="frame size; default: the configuration's")
    parser.add_argument("--num-slots", type=int, help="frames outstanding; default: the configuration's")
    parser.add_argument("--credit-mib", type=int, help="bytes that may be on their way; default: the configuration's")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file too")
    parser.add_argument("--far-port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    changes: dict[str, int] = {}
    if args.slot_mib:
        changes["slot_bytes"] = int(args.slot_mib * MIB) + HEADER_BYTES
    if args.num_slots:
        changes["num_slots"] = args.num_slots
    if args.credit_mib:
        changes["credit_bytes"] = args.credit_mib * MIB
    max_tokens = max([args.goodput_mib, *args.exposed_mib]) * MIB // LAYOUT.bytes_per_token
    if args.far_port:
        (carrier,) = args.carrier
        config = KvTransferConfig.model_validate({"backend": carrier, "host": "127.0.0.1", **changes})
        asyncio.run(run_far_side(args.far_port, max_tokens, args.goodput_mib * MIB, config))
        return
    machine = describe_setting("torch", "numpy", "xxhash")

    def emit(name: str, **values: object) -> None:
        line = json.dumps({"benchmark": name, **values, "machine": machine})
        print(line, flush=True)
        if args.output:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    for carrier in args.carrier:
        config = KvTransferConfig.model_validate({"backend": carrier, "host": "127.0.0.1", **changes})
        with create_listener(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        far = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.link", *sys.argv[1:], "--carrier", carrier, "--far-port", str(port)],
            cwd=Path(__file__).parent.parent,
        )
        try:
            asyncio.run(run_near_side(args, port, max_tokens, config, emit))
            far.wait(WAIT_S)
        finally:
            far.kill()
            far.wait(WAIT_S)


if __name__ == "__main__":
    main()
