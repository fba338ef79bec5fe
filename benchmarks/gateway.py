"""What a gateway adds between workers and clients: tokens per second of a process, and time.

Real gateway processes (`python -m router`) and a real Redis; workers that compute nothing and emit a token of every
stream per step (`gateway_workers`), and bare clients (`gateway_wires`), each in a process of its own.

1. `throughput`: streams at a time, each followed by the next; workers emit as fast as they are read. Tokens per second,
   CPU seconds of the gateway per 1,000 tokens, and tokens per CPU second: on a machine that runs workers and clients on
   the same cores, the latter is what a core of its own would give a gateway. `tokens_per_event`: a client that is
   slower than the workers is told several tokens at once.
2. `latency`: the same at a pace. From when the worker handed a step to gRPC until the client had its token, so both
   sockets are in it. `offered_tokens_per_s` is at most `--max-offered`: a gateway at its limit tells of queues only.
3. `ttft`: one request after the other, alone and beside 64 paced streams, answered by the workers at once.
4. `replicas`: throughput of two gateway processes on one port.

Prints one JSON line per result and appends it to a file. Run ``python -m benchmarks.gateway --help``.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import yaml

from benchmarks import gateway_load, gateway_workers
from benchmarks.gateway_latency import added_ms, percentile, ttfts_ms
from benchmarks.gateway_load import Order, Protocol, Told
from benchmarks.gateway_wires import TOKEN_CHARACTERS
from benchmarks.setting import describe_setting
from cluster.redis_server import executable, free_ports
from core.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny"
_CLUSTER = "gateway-benchmark"
_PARTS = ("throughput", "latency", "ttft", "replicas")
_PROTOCOLS: tuple[Protocol, ...] = ("grpc", "http")
_BACKGROUND = 64
_START_S = 60.0


@dataclass(slots=True)
class Helper:
    """A process of ours that obeys a pipe."""

    process: SpawnProcess
    pipe: Connection

    @classmethod
    def start(cls, target: Any, *arguments: Any) -> "Helper":
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=target, args=(*arguments, theirs), daemon=True)
        process.start()
        helper = cls(process, ours)
        helper.answer()
        return helper

    def tell(self, what: str, value: Any = None) -> None:
        self.pipe.send((what, value))

    def ask(self, what: str, value: Any = None) -> Any:
        self.tell(what, value)
        return self.answer()

    def answer(self) -> Any:
        if not self.pipe.poll(_START_S):
            raise RuntimeError("a process of the benchmark gives no answer")
        return self.pipe.recv()

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self.tell("stop")
        self.process.join(10)
        self.process.kill()


@dataclass(frozen=True, slots=True)
class Bed:
    """What a run has. `gateways`: process ids."""

    gateways: tuple[int, ...]
    addresses: dict[Protocol, tuple[str, ...]]
    workers: Helper
    load: Helper
    probe: Helper

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds up to now."""
        ours = {"gateways": self.gateways, "workers": (self.workers.process.pid,), "load": (self.load.process.pid,)}
        return {name: sum(_cpu_s(pid) for pid in pids if pid) for name, pids in ours.items()}


def _cpu_s(pid: int) -> float:
    """Of a process with all its threads."""
    after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _token_ids() -> tuple[int, ...]:
    """Tokens of one length that need no escape, so that a client knows how many a text has."""
    vocabulary = Vocabulary.load(MODEL / "tokenizer.json")
    texts = ((one, vocabulary.token_text(one)) for one in range(4096) if not vocabulary.is_special(one))
    return tuple(one for one, text in texts if len(text) == TOKEN_CHARACTERS and text.isascii() and text.isalpha())


@contextlib.contextmanager
def _bed(num_gateways: int, options: argparse.Namespace) -> Iterator[Bed]:
    """Bring all up; everything is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="tandem-gateway-") as name, contextlib.ExitStack() as stack:
        folder, (redis_port, grpc_port, http_port) = Path(name), free_ports(3)
        redis = [executable(), "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", name]
        stack.callback(_end, subprocess.Popen(redis, stdout=subprocess.DEVNULL))
        url = f"redis://127.0.0.1:{redis_port}/0"
        workers = Helper.start(gateway_workers.serve, gateway_workers.Setting(url, _CLUSTER, _token_ids()))
        stack.callback(workers.stop)
        pids = []
        for number in range(num_gateways):
            router = {
                "model_path": str(MODEL), "served_model_name": "tiny", "host": "127.0.0.1", "port": grpc_port,
                "http": {"port": http_port}, "share_port": num_gateways > 1, "routing": {"modes": [options.mode]},
                # Replies to new requests come behind all tokens that such workers have sent already.
                "workers": {"accept_timeout_s": 20.0, "hold_timeout_s": 20.0},
            }  # fmt: skip
            settings = {"cluster": _CLUSTER, "redis_url": url, "log_level": "WARNING", "router": router}
            config = folder / f"gateway-{number}.yaml"
            config.write_text(yaml.safe_dump(settings), encoding="utf-8")
            command = [sys.executable, "-m", "router", "--config", str(config)]
            gateway = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            stack.callback(_end, gateway)
            assert gateway.stdout is not None
            if not gateway.stdout.readline().startswith("listening on "):
                raise RuntimeError("a gateway did not start")
            pids.append(gateway.pid)
        load, probe = Helper.start(gateway_load.serve), Helper.start(gateway_load.serve)
        stack.callback(load.stop)
        stack.callback(probe.stop)
        addresses: dict[Protocol, tuple[str, ...]] = {
            "grpc": (f"127.0.0.1:{grpc_port}",),
            "http": (f"127.0.0.1:{http_port}",),
        }
        bed = Bed(tuple(pids), addresses, workers, load, probe)
        _warm_up(bed)
        yield bed


def _end(process: "subprocess.Popen[Any]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _warm_up(bed: Bed) -> None:
    """Until every gateway has workers and both its doors have answered."""
    until = time.monotonic() + _START_S
    for protocol in _PROTOCOLS:
        while True:
            told = _run(bed.load, Order(protocol, bed.addresses[protocol], 32, 8), 0.3)
            if told.num_done and not told.errors:
                break
            if time.monotonic() > until:
                raise RuntimeError(f"the gateways do not answer over {protocol}: {told.errors[:3]}")


def _run(load: Helper, order: Order, duration_s: float) -> Told:
    load.ask("start", order)
    time.sleep(duration_s)
    told: Told = load.ask("end")
    return told


class Benchmark:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._setting = describe_setting("grpcio", "protobuf", "uvicorn")

    def run(self) -> None:
        options = self._options
        if set(options.parts) - {"replicas"}:
            with _bed(1, options) as bed:
                for protocol, num_streams in itertools.product(options.protocols, options.streams):
                    if "throughput" in options.parts:
                        self._throughput(bed, protocol, num_streams, "throughput")
                    if "latency" in options.parts:
                        self._latency(bed, protocol, num_streams)
                for protocol, beside in itertools.product(options.protocols, (0, _BACKGROUND)):
                    if "ttft" in options.parts:
                        self._ttft(bed, protocol, beside)
        if "replicas" in options.parts:
            for num_gateways in (1, 2):
                with _bed(num_gateways, options) as bed:
                    for protocol in options.protocols:
                        self._throughput(bed, protocol, options.replica_streams, "replicas")

    def _throughput(self, bed: Bed, protocol: Protocol, num_streams: int, part: str) -> None:
        options = self._options
        bed.workers.tell("pace", 0.0)
        order = Order(protocol, bed.addresses[protocol], num_streams, options.max_tokens, spread_s=options.warm_up / 2)
        bed.load.ask("start", order)
        time.sleep(options.warm_up)
        before, cpu_before = bed.load.ask("look"), bed.cpu_s()
        time.sleep(options.seconds)
        after, cpu_after = bed.load.ask("look"), bed.cpu_s()
        errors = bed.load.ask("end").errors
        bed.workers.ask("times")
        seconds, num_tokens = after.at - before.at, after.num_tokens - before.num_tokens
        cpu = {name: cpu_after[name] - cpu_before[name] for name in cpu_after}
        self._write(
            part, protocol=protocol, gateways=len(bed.gateways), streams=num_streams, errors=list(errors[:3]),
            tokens_per_s=round(num_tokens / seconds), answers_per_s=round((after.num_done - before.num_done) / seconds),
            tokens_per_event=round(num_tokens / max(1, after.num_events - before.num_events), 2),
            tokens_per_cpu_s=round(num_tokens / max(0.01, cpu["gateways"])),
            cpu_s_per_1000_tokens=round(1000 * cpu["gateways"] / max(1, num_tokens), 4),
            gateways_cores=round(cpu["gateways"] / seconds, 2), workers_cores=round(cpu["workers"] / seconds, 2),
            load_cores=round(cpu["load"] / seconds, 2),
        )  # fmt: skip

    def _latency(self, bed: Bed, protocol: Protocol, num_streams: int) -> None:
        options = self._options
        pace = min(options.pace, options.max_offered / num_streams)
        bed.workers.tell("pace", pace)
        duration_s = options.warm_up + options.seconds
        max_tokens = min(1024, max(8, int(pace * duration_s)))
        order = Order(
            protocol, bed.addresses[protocol], num_streams, max_tokens, is_traced=True, spread_s=options.warm_up
        )
        cpu_before = bed.cpu_s()["gateways"]
        told = _run(bed.load, order, duration_s)
        cpu_s = bed.cpu_s()["gateways"] - cpu_before
        latencies = added_ms(told.streams, bed.workers.ask("times"))
        self._write(
            "latency", protocol=protocol, gateways=1, streams=num_streams, errors=list(told.errors[:3]),
            tokens_per_s_of_stream=round(pace, 1), offered_tokens_per_s=round(pace * num_streams),
            tokens=len(latencies), added_p50_ms=percentile(latencies, 50), added_p99_ms=percentile(latencies, 99),
            cpu_s_per_1000_tokens=round(1000 * cpu_s / max(1, told.num_tokens), 4),
        )  # fmt: skip

    def _ttft(self, bed: Bed, protocol: Protocol, beside: int) -> None:
        options = self._options
        bed.workers.tell("pace", options.pace)
        if beside:
            bed.load.ask("start", Order(protocol, bed.addresses[protocol], beside, 1024, spread_s=options.warm_up))
            time.sleep(options.warm_up)
        told = _run(bed.probe, Order(protocol, bed.addresses[protocol], 1, 1, is_traced=True), options.seconds)
        if beside:
            bed.load.ask("end")
        bed.workers.ask("times")
        found = ttfts_ms(told.streams)
        self._write(
            "ttft", protocol=protocol, gateways=1, beside_streams=beside, requests=len(found),
            errors=list(told.errors[:3]), ttft_p50_ms=percentile(found, 50), ttft_p99_ms=percentile(found, 99),
            ttft_mean_ms=round(statistics.fmean(found), 3) if found else None,
        )  # fmt: skip

    def _write(self, part: str, **facts: Any) -> None:
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"benchmark": "gateway", "part": part, "mode": self._options.mode, **facts}
        print(json.dumps(row), flush=True)
        if self._options.out is not None:
            with self._options.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"at": at, **row, **self._setting}) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--protocols", nargs="+", choices=_PROTOCOLS, default=_PROTOCOLS)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 64, 256, 512], help="at a time")
    parser.add_argument("--replica-streams", type=int, default=256, help="at a time, over two gateways")
    parser.add_argument("--mode", choices=("remote_prefill", "colocated"), default="remote_prefill")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=1.5, help="seconds before it")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer in `throughput`")
    parser.add_argument("--pace", type=float, default=50.0, help="tokens per second of a stream in `latency`")
    parser.add_argument("--max-offered", type=float, default=6000.0, help="tokens per second of all in `latency`")
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"gateway_{today}.jsonl")
    Benchmark(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    main()
