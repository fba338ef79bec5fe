"""Fuzz both front doors of a running gateway for a bounded time: spoilt JSON bodies, heads of HTTP, protobuf messages.

``python -m tools.fuzz_doors --grpc host:port --http host:port --seconds S``: a finding is an HTTP status of 500, an
error that is not OpenAI's object, a gRPC status that blames us (INTERNAL, UNKNOWN, DATA_LOSS), or no answer at all in
time. Prints one JSON object; exits 1 on findings, each with what was sent, in base64. The API key, if the gateway wants
one, comes from TANDEM_API_KEY.
"""

import argparse
import asyncio
import base64
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc

from core.rpc import connect
from tools.door_mutations import Spoilt, spoil

_AT_ONCE = 8
_MAX_BYTES = 2**20  # who still sends when a large body is refused, and asked for the connection's end, may hear nothing
_MAX_FINDINGS = 10
_OURS = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
_ERROR_FIELDS = {"message", "type", "param", "code"}


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway. `patience_s`: an answer that takes longer is a finding."""

    grpc_address: str
    http_address: str
    authorization: str = ""
    patience_s: float = 30.0


@dataclass(slots=True)
class Report:
    """What came of it. `answers`: by door and status."""

    answers: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, str]] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        return {"runs": self.answers.total(), "answers": dict(self.answers), "findings": self.findings}


async def fuzz(target: Target, *, seed: int, runs: int, seconds: float) -> Report:
    """Send so many requests, or for so long, whatever ends first."""
    rng, report, until = Random(seed), Report(), time.monotonic() + seconds
    drawn = (spoil(rng, target.authorization) for _ in range(runs))
    cases = (case for case in drawn if len(case.content) <= _MAX_BYTES)

    async def send() -> None:
        for case in cases:
            answer, problem = await _ask(target, channel, case)
            report.answers[f"{case.door} {answer}"] += 1
            if problem:
                sent = base64.b64encode(case.content).decode()
                report.findings.append({"door": case.door, "path": case.path, "problem": problem, "sent": sent})
            if time.monotonic() > until or len(report.findings) >= _MAX_FINDINGS:
                return

    async with connect(target.grpc_address) as channel:
        await asyncio.gather(*(send() for _ in range(_AT_ONCE)))
    return report


async def _ask(target: Target, channel: grpc.aio.Channel, case: Spoilt) -> tuple[str, str]:
    """Return the status, and what is wrong with the answer, if something is."""
    try:
        async with asyncio.timeout(target.patience_s):
            return await (_ask_grpc(target, channel, case) if case.door == "grpc" else _ask_http(target, case))
    except TimeoutError:
        return "none", f"no end within {target.patience_s:g} s"


async def _ask_grpc(target: Target, channel: grpc.aio.Channel, case: Spoilt) -> tuple[str, str]:
    begin: Any = channel.unary_stream(f"/tandem.v1.Inference/{case.path}")
    metadata = [("authorization", target.authorization)] if target.authorization else []
    try:
        async for _ in begin(case.content, metadata=metadata):
            pass
    except grpc.aio.AioRpcError as error:
        code = str(error.code().name)
        return code, f"{code}: {error.details()}" if code in _OURS else ""
    return "OK", ""


async def _ask_http(target: Target, case: Spoilt) -> tuple[str, str]:
    host, _, port = target.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        if case.is_raw:
            writer.write(case.content)
            writer.write_eof()  # a head or a body that lost its end is not waited for
        else:
            head = (
                f"POST {case.path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
                f"authorization: {target.authorization}\r\ncontent-length: {len(case.content)}\r\n"
                "connection: close\r\n\r\n"
            )
            writer.write(head.encode() + case.content)
        reply = await reader.read()
    except ConnectionError:
        reply = b""
    finally:
        writer.transport.abort()
    return _judged(reply, may_be_silent=case.is_raw)


def _judged(reply: bytes, *, may_be_silent: bool) -> tuple[str, str]:
    """Return the status of a whole answer, and what is wrong with it. Pure."""
    if not reply and may_be_silent:  # what has no end has no answer
        return "none", ""
    head, _, body = reply.partition(b"\r\n\r\n")
    status = head[9:12].decode("latin-1")
    if not head.startswith(b"HTTP/1.1 ") or not status.isdigit():
        return "none", f"no answer but {reply[:80]!r}"
    if status == "500":
        return status, body[:300].decode(errors="replace")
    if int(status) < 400:
        return status, ""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return status, f"no error object but {body[:200]!r}"
    return status, "" if set(error) == _ERROR_FIELDS else f"an error of {sorted(error)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_doors", description=__doc__.partition("\n")[0])
    parser.add_argument("--grpc", required=True, help="host:port")
    parser.add_argument("--http", required=True, help="host:port")
    parser.add_argument("--runs", type=int, default=1_000_000, help="requests at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="time at most")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    key = os.environ.get("TANDEM_API_KEY", "")
    target = Target(options.grpc, options.http, f"Bearer {key}" if key else "")
    report = asyncio.run(fuzz(target, seed=options.seed, runs=options.runs, seconds=options.seconds))
    print(json.dumps(report.told()))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
