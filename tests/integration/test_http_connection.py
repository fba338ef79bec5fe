"""Connections that break the rules, or just break: over real sockets, to a gateway with short patience."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from tests.certificates import Authority
from tests.fakes.cluster import FakeCluster, fake_cluster
from tests.fakes.decode import FakeDecodeWorker
from tests.fakes.http import CHAT, DONE, TEXT, RawConnection, events_of, http_client, raw_connection
from tests.fakes.script import PATIENCE_S

PROBE = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"
SHORT: dict[str, Any] = {"header_timeout_s": 0.1, "body_timeout_s": 0.1}


def error_in(response: bytes) -> tuple[int, dict[str, Any]]:
    """Return the status and the error object of a whole response; the connection was closed behind it."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def allow_steps(worker: FakeDecodeWorker) -> None:
    for _ in range(100):
        worker.steps_allowed.release()


async def test_a_connection_that_says_nothing_is_closed(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, http=SHORT) as cluster, raw_connection(cluster) as raw:
        assert await raw.read_to_end() == b""


async def test_a_connection_that_does_not_finish_its_handshake_is_closed(checkpoint: Path, tmp_path: Path) -> None:
    own = Authority(tmp_path, "doors").issue("gateway")
    tls = {"certificate": own.certificate, "private_key": own.private_key}
    async with fake_cluster(checkpoint, http=SHORT, tls=tls, is_waited_for=False) as cluster:
        for said in (b"", b"\x16\x03\x01\x02\x00", PROBE):
            async with raw_connection(cluster) as raw:
                raw.say(said)
                assert b"HTTP/1.1 200" not in await raw.read_to_end()


@pytest.mark.parametrize("head", [b"G", b"GET /live HTTP/1.1\r\n", PROBE[:-2], b"\r\n"])
async def test_a_head_that_does_not_end_is_refused(checkpoint: Path, head: bytes) -> None:
    async with fake_cluster(checkpoint, http=SHORT) as cluster, raw_connection(cluster) as raw:
        raw.say(head)
        response = await raw.read_to_end()
        if head.strip():
            status, error = error_in(response)
            assert (status, error["type"]) == (408, "timeout_error")
        else:  # a line break is no beginning of a request
            assert response == b""


async def test_a_head_that_trickles_is_refused(checkpoint: Path) -> None:
    async def trickle(raw: RawConnection) -> None:
        raw.say(PROBE[:-2])
        while True:
            raw.say(b"x: y\r\n")
            await asyncio.sleep(0.01)  # the whole point: something comes all the time

    async with fake_cluster(checkpoint, http=SHORT) as cluster, raw_connection(cluster) as raw:
        trickling = asyncio.create_task(trickle(raw))
        response = await raw.read_to_end()
        trickling.cancel()
        assert error_in(response)[0] == 408


async def test_a_second_request_that_does_not_end_is_refused(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, http=SHORT) as cluster, raw_connection(cluster) as raw:
        raw.say(PROBE)
        assert (await raw.answer())[0] == 200
        raw.say(PROBE[:-2])
        assert error_in(await raw.read_to_end())[0] == 408


@pytest.mark.parametrize("body", [b"", b'{"prompt": "hel'])
async def test_a_body_that_does_not_end_is_refused(checkpoint: Path, body: bytes) -> None:
    async with fake_cluster(checkpoint, http=SHORT) as cluster, raw_connection(cluster) as raw:
        raw.post("/v1/completions", body, "content-length: 100")
        status, error = error_in(await raw.read_to_end())
        assert (status, error["message"]) == (408, "the request's body did not arrive in time")


async def test_a_client_that_leaves_its_body_half_said_is_forgotten(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        async with raw_connection(cluster) as raw:
            raw.post("/v1/completions", b'{"prompt": "hel', "content-length: 100")
        async with http_client(cluster) as client:
            assert (await client.get("/live")).status_code == 200
        assert cluster.holds_nothing()


LARGE_HEADS = {
    "one value": b"GET /live HTTP/1.1\r\nx: " + b"y" * 5000 + b"\r\n\r\n",
    "one value without end": b"GET /live HTTP/1.1\r\nx: " + b"y" * 500_000,
    "one name without end": b"GET /live HTTP/1.1\r\n" + b"y" * 500_000,
    "many": b"GET /live HTTP/1.1\r\n" + b"x: y\r\n" * 1000 + b"\r\n",
    "many without end": b"GET /live HTTP/1.1\r\n" + b"x: y\r\n" * 100_000,
    "the path": b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\n\r\n",
    "the path without end": b"GET /" + b"y" * 500_000,
    "trailers": b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 1000,
}


@pytest.mark.parametrize("head", LARGE_HEADS.values(), ids=LARGE_HEADS)
async def test_large_heads_are_refused(checkpoint: Path, head: bytes) -> None:
    async with fake_cluster(checkpoint, http={"max_header_bytes": 4096}) as cluster, raw_connection(cluster) as raw:
        raw.say(head)
        response = await raw.read_to_end()
        if response:  # a peer that goes on talking to a closed socket may lose what it was told
            assert error_in(response)[0] == 431


NO_HTTP = {
    "binary": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a space in the name": b"GET /live HTTP/1.1\r\nx y: z\r\n\r\n",
    "a control character in a value": b"GET /live HTTP/1.1\r\nx: a\x01b\r\n\r\n",
    "two lengths": b"POST /tokenize HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a length and chunks": b"POST /tokenize HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
    "a negative length": b"POST /tokenize HTTP/1.1\r\ncontent-length: -2\r\n\r\n{}",
    "a chunk without a length": b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    "a tunnel": b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP)
async def test_what_is_no_http_is_refused(checkpoint: Path, data: bytes) -> None:
    async with fake_cluster(checkpoint, http=SHORT) as cluster, raw_connection(cluster) as raw:
        raw.say(data)
        status, error = error_in(await raw.read_to_end())
        assert (status, error["message"]) == (400, "this is not a valid HTTP request")


async def test_a_large_body_is_refused_as_it_arrives(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, http={"max_body_bytes": 1000}) as cluster:
        async with raw_connection(cluster) as raw:
            raw.post("/v1/completions", b"", "content-length: 1001", "expect: 100-continue")
            status, error = await raw.answer()  # nobody was told to go on
            assert (status, error["error"]["message"]) == (413, "the body has more than 1000 bytes")
        async with raw_connection(cluster) as raw:
            raw.post("/v1/completions", b"400\r\n" + b" " * 1024 + b"\r\n", "transfer-encoding: chunked")
            assert (await raw.answer())[0] == 413  # the end of the body was never said
        async with http_client(cluster) as client:  # one that says everything before it listens hears the answer
            response = await client.post("/v1/completions", json={"prompt": "x" * 3_000_000})
            assert response.status_code == 413


async def test_a_body_that_was_refused_is_told_nothing_more(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, http=SHORT | {"max_body_bytes": 10}) as cluster, raw_connection(cluster) as raw:
        raw.post("/v1/completions", b"", "content-length: 100")
        assert (await raw.answer())[0] == 413
        assert await raw.read_to_end() == b""


async def test_a_body_may_come_in_small_chunks(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, raw_connection(cluster) as raw:
        body = json.dumps(TEXT).encode()
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        raw.post("/v1/completions", chunks, "transfer-encoding: chunked", "expect: 100-continue")
        assert (await raw.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        status, reply = await raw.answer()
        assert (status, reply["choices"][0]["text"]) == (200, "abcde")


async def test_requests_that_come_at_once_are_answered_in_turn(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, raw_connection(cluster) as raw:
        for number in range(3):
            raw.post("/v1/completions", json.dumps(TEXT | {"max_tokens": number + 1}).encode())
        assert [(await raw.answer())[1]["choices"][0]["text"] for _ in range(3)] == ["a", "ab", "abc"]


async def test_a_connection_that_rests_too_long_is_closed(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, http={"keep_alive_s": 0.05}) as cluster, raw_connection(cluster) as raw:
        raw.say(PROBE)
        assert (await raw.answer())[0] == 200
        assert await raw.read_to_end() == b""


async def test_one_connection_too_many_is_turned_away(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, http={"max_connections": 2}) as cluster:
        async with raw_connection(cluster) as one, raw_connection(cluster) as two:
            for raw in (one, two):
                raw.say(PROBE)
                assert (await raw.answer())[0] == 200
            async with raw_connection(cluster) as third:
                assert error_in(await third.read_to_end())[0] == 503
        async with http_client(cluster) as client:
            response = await client.get("/live")
            while response.status_code == 503:  # the server has not seen yet that they are gone
                response = await client.get("/live")
            assert response.status_code == 200


class TestClientsThatLeave:
    """The request ends on every worker, whatever it was doing."""

    async def leave(self, cluster: FakeCluster, raw: RawConnection, *, half: bool) -> None:
        if half:
            raw.writer.write_eof()
        else:
            raw.writer.transport.abort()
        await cluster.prefills[0].wait_aborted("leaver")
        await cluster.wait_idle()
        assert cluster.holds_nothing()

    @pytest.mark.parametrize("half", [False, True], ids=["reset", "half closed"])
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize(("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
    async def test_before_the_first_token(
        self, checkpoint: Path, path: str, body: dict[str, object], stream: bool, half: bool
    ) -> None:
        async with fake_cluster(checkpoint) as cluster, raw_connection(cluster) as raw:
            cluster.prefills[0].script.go.clear()
            raw.post(path, json.dumps(body | {"stream": stream}).encode(), "x-request-id: leaver")
            await cluster.prefills[0].wait_submitted()
            await self.leave(cluster, raw, half=half)

    @pytest.mark.parametrize("half", [False, True], ids=["reset", "half closed"])
    async def test_in_the_middle_of_a_stream(self, checkpoint: Path, half: bool) -> None:
        async with fake_cluster(checkpoint) as cluster, raw_connection(cluster) as raw:
            worker = cluster.decodes[0]
            worker.steps_allowed = asyncio.Semaphore(2)
            raw.post("/v1/completions", json.dumps(TEXT | {"stream": True}).encode(), "x-request-id: leaver")
            await raw.read_until(b'"text":"a')
            await worker.wait_submitted()
            if half:
                raw.writer.write_eof()
            else:
                raw.writer.transport.abort()
            await worker.wait_aborted("leaver")
            await cluster.wait_idle()
            assert cluster.holds_nothing()


async def test_a_reader_that_does_not_read_is_cut_off(checkpoint: Path) -> None:
    async with (
        fake_cluster(checkpoint, write_timeout_s=0.1) as cluster,
        raw_connection(cluster, receive_buffer=4096) as raw,
    ):
        body = TEXT | {"max_tokens": 400, "n": 8, "logprobs": 20, "stream": True}
        raw.post("/v1/completions", json.dumps(body).encode())
        await cluster.prefills[0].wait_submitted()
        await cluster.wait_idle()
        assert DONE.encode() not in await raw.read_to_end()
        assert cluster.holds_nothing()


async def test_a_stray_line_break_does_not_end_an_answer(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, http=SHORT) as cluster, raw_connection(cluster) as raw:
        worker = cluster.decodes[0]
        worker.steps_allowed = asyncio.Semaphore(0)
        raw.post("/v1/completions", json.dumps(TEXT | {"stream": True}).encode() + b"\r\n")
        head = await raw.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        async with raw_connection(cluster) as silent:
            await silent.read_to_end()  # whatever was to happen to the other within the same time has happened
        allow_steps(worker)
        assert b"[DONE]" in await raw.read_until(b"[DONE]")


async def test_streams_finish_while_the_gateway_drains(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        worker = cluster.decodes[0]
        worker.steps_allowed = asyncio.Semaphore(0)
        async with client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            stopping = asyncio.create_task(cluster.gateway.stop(PATIENCE_S))
            await cluster.wait_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
            assert (await client.get("/live")).status_code == 200
            refused = await client.post("/v1/completions", json=TEXT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_workers")
            assert int(refused.headers["retry-after"]) >= 1
            allow_steps(worker)
            rest = [line async for line in lines if line]
            assert rest[-1] == f"data: {DONE}"
        await stopping


async def test_streams_that_do_not_finish_are_told_so(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        cluster.decodes[0].steps_allowed = asyncio.Semaphore(0)
        async with client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as response:
            text = aiter(response.aiter_text())
            first = await anext(text)
            await cluster.gateway.stop(0.0)
            events = events_of(first + "".join([more async for more in text]))
        assert events[-1]["error"]["message"] == "the gateway is stopping"
        assert DONE not in events
