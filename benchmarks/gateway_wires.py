"""Clients for the benchmark of gateways: HTTP/1.1 with server-sent events, and gRPC, as bare as both can be.

The machine that runs the gateways runs their clients too, and an ordinary gRPC client needs more of it for a token than
a gateway. These send requests that were put together before, and look at no more of an answer than how many tokens it
tells of and when it is over.
"""

import asyncio
import json
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from protos import inference_pb2 as pb

TOKEN_CHARACTERS = 4  # of every token that the benchmark's workers emit; none needs an escape in JSON
_CONTENT = b'"content":"'
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_MAX_WINDOW = 2**31 - 1
_FRAME_HEAD = 9
_MESSAGE_HEAD = 5


@dataclass(slots=True)
class Seen:
    """What one stream gave."""

    request_id: str
    asked_at: float
    events: list[tuple[float, int]] | None = None  # when, and how many tokens there were then
    first_at: float = 0.0
    num_tokens: int = 0
    is_over: bool = False
    error: str = ""


@dataclass(slots=True)
class Totals:
    """What all streams gave."""

    num_tokens: int = 0
    num_events: int = 0
    num_done: int = 0
    errors: list[str] = field(default_factory=list)
    streams: list[Seen] = field(default_factory=list)


class _Wire(asyncio.Protocol):
    """What both have: counting, and telling that a stream ended."""

    def __init__(self, totals: Totals, on_end: Callable[[Seen], None]) -> None:
        self._totals = totals
        self._on_end = on_end
        self._buffer = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by inheritance

    def _count(self, seen: Seen, num_tokens: int, now: float) -> None:
        totals = self._totals
        totals.num_tokens += num_tokens
        totals.num_events += 1
        if not seen.num_tokens:
            seen.first_at = now
        seen.num_tokens += num_tokens
        if seen.events is not None:
            seen.events.append((now, seen.num_tokens))

    def _end(self, seen: Seen, error: str = "") -> None:
        seen.is_over = True
        seen.error = error
        if error:
            self._totals.errors.append(error)
        else:
            self._totals.num_done += 1
        self._on_end(seen)


class HttpWire(_Wire):
    """One connection, one answer after the other."""

    def __init__(self, totals: Totals, on_end: Callable[[Seen], None], authority: str) -> None:
        super().__init__(totals, on_end)
        self._authority = authority
        self._seen: Seen | None = None

    def ask(self, seen: Seen, prompt: str, max_tokens: int) -> None:
        body = json.dumps(
            {
                "model": "tiny",
                "stream": True,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "messages": [{"role": "user", "content": prompt}],
            }
        )
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._authority}\r\ncontent-type: application/json\r\n"
            f"x-request-id: {seen.request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._seen = seen
        assert self.transport is not None
        self.transport.write((head + body).encode())

    def data_received(self, data: bytes) -> None:
        now, seen = time.monotonic(), self._seen
        data = self._buffer + data if self._buffer else data
        at, end = 0, data.rfind(b"\n\n") + 2
        if (end < 2 and data.startswith(b"HTTP/1.1 2")) or seen is None:
            self._buffer = data
            return
        while (at := data.find(_CONTENT, at, end)) >= 0:
            at += len(_CONTENT)
            length = data.index(b'"', at) - at
            if length:
                self._count(seen, length // TOKEN_CHARACTERS, now)
        self._buffer = data[end:] if end >= 2 else data
        if b"data: [DONE]" in data:
            if not self._buffer.endswith(b"0\r\n\r\n"):
                return  # the last chunk's end is on the way
            self._buffer, self._seen = b"", None
            self._end(seen)
        elif b'"error":' in data or data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
            self._seen = None
            self._end(seen, data[:300].decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._seen is not None:
            self._end(self._seen, f"the connection was lost: {exc}")


class GrpcWire(_Wire):
    """One connection, many streams."""

    def __init__(self, totals: Totals, on_end: Callable[[Seen], None], authority: str) -> None:
        super().__init__(totals, on_end)
        self._next_id = 1
        self._open: dict[int, Seen] = {}
        self._partial: dict[int, bytes] = {}
        self._head = _request_head(authority)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        settings = struct.pack(">HIHI", 2, 0, 4, _MAX_WINDOW)  # no push; windows as wide as they can be
        window = struct.pack(">I", _MAX_WINDOW - 65_535)
        assert self.transport is not None
        self.transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, window))

    def ask(self, seen: Seen, prompt: str, max_tokens: int) -> None:
        sampling = pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = pb.GenerateRequest(request_id=seen.request_id, text=prompt, sampling=sampling)
        message = request.SerializeToString()
        stream, self._next_id = self._next_id, self._next_id + 2
        self._open[stream] = seen
        body = struct.pack(">BI", 0, len(message)) + message
        assert self.transport is not None
        self.transport.write(
            _frame(_HEADERS, _END_HEADERS, stream, self._head) + _frame(_DATA, _END_STREAM, stream, body)
        )

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self._buffer + data if self._buffer else data
        at, end = 0, len(data)
        while end - at >= _FRAME_HEAD:
            length = int.from_bytes(data[at : at + 3])
            after = at + _FRAME_HEAD + length
            if after > end:
                break
            kind, flags = data[at + 3], data[at + 4]
            if kind == _DATA:
                stream = int.from_bytes(data[at + 5 : at + 9])
                self._messages(stream, data[at + _FRAME_HEAD : after], now)
            else:
                self._other(kind, flags, int.from_bytes(data[at + 5 : at + 9]), data[at + _FRAME_HEAD : after])
            at = after
        self._buffer = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        for seen in list(self._open.values()):
            self._end(seen, f"the connection was lost: {exc}")
        self._open.clear()

    def _messages(self, stream: int, data: bytes, now: float) -> None:
        if stream in self._partial:
            data = self._partial.pop(stream) + data
        seen, at = self._open[stream], 0
        while len(data) - at >= _MESSAGE_HEAD:
            after = at + _MESSAGE_HEAD + int.from_bytes(data[at + 1 : at + _MESSAGE_HEAD])
            if after > len(data):
                break
            response = pb.GenerateResponse.FromString(data[at + _MESSAGE_HEAD : after])
            if num_tokens := len(response.delta.tokens):
                self._count(seen, num_tokens, now)
            elif response.HasField("finished"):
                seen.is_over = True
            at = after
        if at < len(data):
            self._partial[stream] = data[at:]

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert self.transport is not None
        if kind == _HEADERS and flags & _END_STREAM:
            seen = self._open.pop(stream)
            self._end(seen, "" if seen.is_over else payload[:300].decode("ascii", "ignore"))
        elif kind == _RST:
            if (seen_or_none := self._open.pop(stream, None)) is not None:
                self._end(seen_or_none, "the stream was reset")
        elif kind == _SETTINGS and not flags & _ACK:
            self.transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            self.transport.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def _request_head(authority: str) -> bytes:
    """The headers of every call, in HPACK without its tables."""
    head = b""
    for name, value in (
        (":method", "POST"), (":scheme", "http"), (":path", "/tandem.v1.Inference/Generate"),
        (":authority", authority), ("te", "trailers"), ("content-type", "application/grpc"),
    ):  # fmt: skip
        head += b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
    return head
