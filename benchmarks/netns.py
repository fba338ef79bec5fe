"""Two network namespaces joined by a veth pair whose rate is shaped in both directions, as if two hosts shared a link.

Everything is named after this process (``tandem-<pid>-near``), so that two runs never meet and `sweep` can remove what
a killed run left, and only that. The veth ends are created inside the namespaces: removing a namespace removes its end,
its shaper and its addresses at once. `ShapedPair` is a context manager; `main`s that use it call `end_on_signals`, so
that SIGTERM unwinds it as SIGINT does.

Shaping is `tc` tbf (htb where the kernel lacks tbf) on both ends. Its bucket holds one millisecond of the rate, 64 KiB
at least (one TCP super-segment), and the queue ten milliseconds: a switch port with shallow buffers. Delay is not
added: the round trip is that of the veth. Congestion control is set to cubic (reno where the kernel refuses that) in
both namespaces, because BBR's probe of the round trip takes the rate away for 200 ms now and then: noise at the length
of these runs.

``python -m benchmarks.netns 100 1000 10000`` measures what a plain socket gets at these Mbit/s.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

_PREFIX = "tandem-"
_NAMESPACES = Path("/run/netns")
_ROOT = Path(__file__).parent.parent
_CONGESTION = "/proc/sys/net/ipv4/tcp_congestion_control"
_PORT = 5001
_COMMAND_TIMEOUT_S = 10.0
_BURST_S, _LEAST_BURST_BYTES = 0.001, 64 * 1024
_QUEUE_S, _LEAST_QUEUE_BYTES = 0.010, 256 * 1024
_READ_BYTES = 1 << 20
_PINGS = 50


class NetnsUnavailable(Exception):  # says more than an Error would
    """This machine, or this user, cannot have shaped namespaces; the message is the reason."""


@dataclass(frozen=True, slots=True)
class End:
    """One side: its namespace, its address, and its end of the veth pair."""

    namespace: str
    host: str
    device: str

    def command(self, *argv: str) -> list[str]:
        """Return the command line that runs `argv` inside. Pure."""
        return ["ip", "netns", "exec", self.namespace, *argv]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a plain TCP socket got: what the rate is worth to anybody."""

    rate_bits_per_s: float
    measured_bits_per_s: float
    rtt_us: float


class ShapedPair:
    """Two namespaces and the link between them; unshaped until `shape` is called."""

    def __init__(self) -> None:
        tag = f"{_PREFIX}{os.getpid()}"
        self.near = End(f"{tag}-near", "10.77.0.1", "near0")
        self.far = End(f"{tag}-far", "10.77.0.2", "far0")
        self.shaper = "tbf"
        self.congestion_control = ""

    def __enter__(self) -> Self:
        """Build it.

        Raises:
            NetnsUnavailable: it cannot be built here; nothing is left.
        """
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise NetnsUnavailable(f"{tool} (of iproute2) is not installed")
        if os.geteuid() != 0:
            raise NetnsUnavailable("network namespaces need root")
        sweep()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def shape(self, bits_per_s: float) -> None:
        """Set the rate of both directions, now; what is queued stays queued."""
        rate = f"{bits_per_s:.0f}bit"
        burst = str(max(_LEAST_BURST_BYTES, round(bits_per_s / 8 * _BURST_S)))
        queue = str(max(_LEAST_QUEUE_BYTES, round(bits_per_s / 8 * _QUEUE_S)))
        for end in (self.near, self.far):
            tc = ("tc", "-n", end.namespace)
            if self.shaper == "tbf":
                limits = ("rate", rate, "burst", burst, "limit", queue)
                _run(*tc, "qdisc", "replace", "dev", end.device, "root", "handle", "1:", "tbf", *limits)
            else:
                limits = ("rate", rate, "burst", burst, "cburst", burst)
                _run(*tc, "class", "replace", "dev", end.device, "parent", "1:", "classid", "1:1", "htb", *limits)

    def calibrate(self, bits_per_s: float, seconds: float = 0.5) -> Calibration:
        """Shape, and measure a plain socket from the near to the far end."""
        self.shape(bits_per_s)
        module = [sys.executable, "-m", "benchmarks.netns"]
        far = subprocess.Popen(
            self.far.command(*module, "--listen", self.far.host), cwd=_ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert far.stdout is not None
            far.stdout.readline()  # it listens
            near = self.near.command(*module, "--send", self.far.host, "--seconds", str(seconds))
            rtt_us = float(_run(*near, cwd=_ROOT, timeout_s=seconds + 20))
            measured, _ = far.communicate(timeout=20)
        finally:
            far.kill()
            far.wait()
        return Calibration(bits_per_s, round(float(measured)), rtt_us)

    def _build(self) -> None:
        for end in (self.near, self.far):
            _run("ip", "netns", "add", end.namespace)
        near, far = (["name", end.device, "netns", end.namespace] for end in (self.near, self.far))
        _run("ip", "link", "add", *near, "type", "veth", "peer", *far)
        for end in (self.near, self.far):
            _run("ip", "-n", end.namespace, "addr", "add", f"{end.host}/24", "dev", end.device)
            for device in ("lo", end.device):
                _run("ip", "-n", end.namespace, "link", "set", device, "up")
            # The kernel's own file: sysctl may be missing where ip and tc are not. Some kernels refuse cubic.
            choose = f"echo cubic > {_CONGESTION} || echo reno > {_CONGESTION}; cat {_CONGESTION}"
            self.congestion_control = _run(*end.command("sh", "-c", choose)).strip()
        try:
            self.shape(1e9)
        except NetnsUnavailable:
            self.shaper = "htb"  # this kernel has no tbf
            for end in (self.near, self.far):
                root = ("dev", end.device, "root", "handle", "1:")
                _run("tc", "-n", end.namespace, "qdisc", "add", *root, "htb", "default", "1")
            self.shape(1e9)

    def _remove(self) -> None:
        for end in (self.near, self.far):
            if (_NAMESPACES / end.namespace).exists():
                _run("ip", "netns", "del", end.namespace)


def sweep() -> list[str]:
    """Remove the namespaces of runs of this benchmark whose process is gone. Returns their names."""
    gone = []
    for path in sorted(_NAMESPACES.glob(f"{_PREFIX}*-*")) if _NAMESPACES.exists() else []:
        owner, _, side = path.name.removeprefix(_PREFIX).partition("-")
        if owner.isdigit() and side in ("near", "far") and not Path(f"/proc/{owner}").exists():
            _run("ip", "netns", "del", path.name)
            gone.append(path.name)
    return gone


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that context managers unwind."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(*argv: str, cwd: Path | None = None, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise NetnsUnavailable(f"{' '.join(argv)}: {done.stderr.strip() or f'ended with {done.returncode}'}")
    return done.stdout


def _listen(host: str) -> float:
    """Answer pings, then swallow bytes; return the bits per second after a first fifth of the time."""
    with socket.create_server((host, _PORT)) as server:
        print("listening", flush=True)
        server.settimeout(_COMMAND_TIMEOUT_S)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(_COMMAND_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_PINGS):
            connection.sendall(connection.recv(1))
        buffer = bytearray(_READ_BYTES)
        marks: list[tuple[float, int]] = []
        total = 0
        while count := connection.recv_into(buffer):
            total += count
            marks.append((time.monotonic(), total))
    begun = marks[0][0] + (marks[-1][0] - marks[0][0]) / 5
    first = next(mark for mark in marks if mark[0] >= begun)
    return (marks[-1][1] - first[1]) * 8 / (marks[-1][0] - first[0])


def _send(host: str, seconds: float) -> float:
    """Ping, then send for a while; return the microseconds of the median ping."""
    payload = bytes(_READ_BYTES)
    with socket.create_connection((host, _PORT), _COMMAND_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pings = []
        for _ in range(_PINGS):
            asked = time.monotonic()
            connection.sendall(b"?")
            connection.recv(1)
            pings.append(time.monotonic() - asked)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            connection.sendall(payload)
    return sorted(pings)[_PINGS // 2] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.netns", description=__doc__.split("\n", 1)[0])
    parser.add_argument("mbit_per_s", type=float, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default 1)")
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    parser.add_argument("--send", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.listen:
        print(_listen(args.listen))
    elif args.send:
        print(_send(args.send, args.seconds))
    else:
        with end_on_signals(), ShapedPair() as pair:
            for mbit in args.mbit_per_s:
                found = pair.calibrate(mbit * 1e6, args.seconds)
                line = {
                    "benchmark": "netns.calibration",
                    "shaper": pair.shaper,
                    "congestion_control": pair.congestion_control,
                    "mbit_per_s": mbit,
                    "measured_mbit_per_s": round(found.measured_bits_per_s / 1e6, 1),
                    "rtt_us": round(found.rtt_us, 1),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
