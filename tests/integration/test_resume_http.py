"""Resumable streams over HTTP, at two gateways over real Redis: the events that a client put together from several
connections are those of a stream that nothing broke."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from protos import inference_pb2 as pb
from tests.fakes.cluster import text_request
from tests.fakes.gateways import Gateways, several_gateways
from tests.fakes.resuming import ResumingReader
from tests.fakes.script import PATIENCE_S
from tests.fakes.tcp_proxy import tcp_proxy

CHAT: tuple[str, dict[str, Any]] = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
TEXT: tuple[str, dict[str, Any]] = ("/v1/completions", {"prompt": "hello"})
TOKENS = 30
WINDOW = {"x-resume-window": "20"}


@asynccontextmanager
async def two_gateways(folder: Path, checkpoint: Path) -> AsyncIterator[tuple[Gateways, list[httpx.AsyncClient]]]:
    async with several_gateways(folder, checkpoint, 2, num_prefills=1, num_decodes=1) as cluster:
        clients = [
            httpx.AsyncClient(base_url=f"http://{seat.gateway.http_address}", timeout=PATIENCE_S, trust_env=False)
            for seat in cluster.seats
        ]
        try:
            yield cluster, clients
        finally:
            for client in clients:
                await client.aclose()


def stop_decoding(cluster: Gateways, num_steps: int) -> None:
    cluster.decodes[0].steps_allowed = asyncio.Semaphore(num_steps)


def decode(cluster: Gateways, num_steps: int = 1000) -> None:
    for _ in range(num_steps):
        cluster.decodes[0].steps_allowed.release()


class Events:
    """Server-sent events, put together from pieces of text."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.data: list[str] = []
        self._rest = ""

    def add(self, text: str) -> None:
        *events, self._rest = (self._rest + text).split("\n\n")
        for event in events:
            fields = dict(line.split(": ", 1) for line in event.split("\n"))
            self.ids.append(int(fields["id"]))
            self.data.append(fields["data"])

    def broken_off(self) -> None:
        """The connection ended: what is no whole event is none."""
        self._rest = ""

    @property
    def last_id(self) -> dict[str, str]:
        return {"last-event-id": str(self.ids[-1])} if self.ids else {}


def words(events: Events) -> list[Any]:
    """What two runs have in common: all but ids, times, and how text was cut into chunks."""
    assert events.data[-1] == "[DONE]"
    chunks = [json.loads(data) for data in events.data[:-1]]
    text = "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
    )
    finishes = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    return [text, finishes, {chunk["object"] for chunk in chunks}, len({chunk["id"] for chunk in chunks})]


@pytest.mark.parametrize(("path", "body"), [CHAT, TEXT])
async def test_a_broken_stream_is_put_together(
    tmp_path: Path, checkpoint: Path, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "stream": True, "max_tokens": TOKENS, "temperature": 0}
    async with two_gateways(tmp_path, checkpoint) as (cluster, (first, second)):
        whole = Events()
        whole.add((await first.post(path, json=body, headers=WINDOW)).text)
        assert whole.ids == list(range(len(whole.ids)))
        plain = (await first.post(path, json=body)).text
        assert "id: " not in plain, "only what can be resumed is numbered"
        stop_decoding(cluster, 1)
        broken = Events()
        async with (
            tcp_proxy(cluster.seats[0].gateway.http_address) as proxy,
            httpx.AsyncClient(base_url=f"http://{proxy.address}", timeout=PATIENCE_S, trust_env=False) as fragile,
        ):
            with pytest.raises(httpx.TransportError):
                await _read_and_break(fragile, proxy.drop, cluster, path, body, broken)
        url = "/v1/streams/broken"
        decode(cluster, 5)
        async with second.stream("GET", url, headers=broken.last_id) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            async for text in response.aiter_text():
                broken.add(text)
                if len(broken.ids) > 5:
                    break
        broken.broken_off()
        decode(cluster)
        broken.add((await first.get(url, headers=broken.last_id)).text)
        assert broken.ids == list(range(len(broken.ids)))
        assert words(broken) == words(whole)
        for client in (first, second):
            again = Events()
            again.add((await client.get(url)).text)
            assert (again.ids, again.data) == (broken.ids, broken.data)
            nothing = await client.get(url, headers=broken.last_id)
            assert (nothing.status_code, nothing.content) == (204, b"")


async def _read_and_break(
    client: httpx.AsyncClient, drop: Any, cluster: Gateways, path: str, body: dict[str, Any], events: Events
) -> None:
    async with client.stream("POST", path, json=body, headers={**WINDOW, "x-request-id": "broken"}) as response:
        assert response.status_code == 200
        assert response.headers["x-tandem-weights-version"] == "fake-weights"
        async for text in response.aiter_text():
            events.add(text)
            decode(cluster, 1)
            if len(events.ids) >= 3:
                drop()


async def test_what_cannot_be_resumed_says_why(tmp_path: Path, checkpoint: Path) -> None:
    async with two_gateways(tmp_path, checkpoint) as (cluster, (first, second)):
        path, body = TEXT
        body = {**body, "max_tokens": 3, "temperature": 0}
        for headers, field in (
            (WINDOW, "x-resume-window"),  # no stream
            ({"x-resume-window": "1e9"}, "x-resume-window"),
            ({"x-resume-window": "301"}, "x-resume-window"),
        ):
            refused = await first.post(path, json=body, headers=headers)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text
        for client in (first, second):
            unknown = await client.get("/v1/streams/never-seen")
            assert unknown.status_code == 404
            assert (await client.get("/v1/streams/two words")).status_code == 400
        own = {**WINDOW, "x-request-id": "mine", "x-tandem-tenant": "acme"}
        await first.post(path, json={**body, "stream": True}, headers=own)
        for client in (first, second):
            assert (await client.get("/v1/streams/mine")).json() == unknown.json(), "nothing tells them apart"
            mine = await client.get("/v1/streams/mine", headers={"x-tandem-tenant": "acme"})
            assert mine.status_code == 200
            for bad in ("x", "-1", "9" * 16, "9999"):
                headers = {"x-tandem-tenant": "acme", "last-event-id": bad}
                refused = await client.get("/v1/streams/mine", headers=headers)
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, "last-event-id"), bad
        code, why = await ResumingReader("mine", "acme").fails(cluster.seats[1].channel)
        assert (code, "GET /v1/streams" in why) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        begun = text_request(request_id="grpc", resume_window_s=20.0)
        await ResumingReader("grpc").begin(cluster.seats[0].channel, begun)
        wrong_door = await second.get("/v1/streams/grpc")
        assert wrong_door.status_code == 400
        assert "Resume goes on with it" in wrong_door.text


async def test_how_it_ended_badly_is_told(tmp_path: Path, checkpoint: Path) -> None:
    async with two_gateways(tmp_path, checkpoint) as (cluster, (first, second)):
        stop_decoding(cluster, 2)
        path, body = CHAT
        body = {**body, "stream": True, "max_tokens": TOKENS}
        events = Events()
        async with first.stream("POST", path, json=body, headers={**WINDOW, "x-request-id": "cut"}) as response:
            async for text in response.aiter_text():
                events.add(text)
                break
        assert (await cluster.seats[1].inference.Abort(pb.AbortRequest(request_id="cut"))).found
        for client in (first, second):
            rest = (await client.get("/v1/streams/cut", headers=events.last_id)).text.strip().split("\n\n")
            assert "[DONE]" not in rest[-1]
            assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "request_cancelled"
            last_id = rest[-2].split("\n")[0].removeprefix("id: ")
            ended = await client.get("/v1/streams/cut", headers={"last-event-id": last_id})
            assert ended.status_code == 499, "with nothing to send first, it is a status"


async def test_metadata_over_grpc_say_how_a_call_is_to_be_served(tmp_path: Path, checkpoint: Path) -> None:
    async with two_gateways(tmp_path, checkpoint) as (cluster, _):
        stub = cluster.seats[0].inference
        metadata = (("x-request-id", "by-metadata"), ("x_resume_window", "20"), ("x-tandem-tenant", "acme"))
        async for event in stub.Generate(text_request(), metadata=metadata):
            if event.HasField("started"):
                assert event.started.request_id == "by-metadata"
        reader = ResumingReader("by-metadata", "acme")
        await reader.resume(cluster.seats[1].channel)
        assert reader.is_over
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _event in stub.Generate(text_request(), metadata=(("x-slo-ttft-ms", "soon"),)):
                pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "x-slo-ttft-ms: must be a number" in (refused.value.details() or "")
