"""Malformed and hostile requests over HTTP, to a gateway process: each is told what is wrong with it, none reaches a
worker, good requests beside them are served, and the process stays as small as it was."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.script import PATIENCE_S
from tests.gateway_process import GatewayDoors, gateway_doors
from tests.issuer import claims, forged

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MAX_BODY_BYTES = 2**20
MAX_GROWTH_MIB = 128  # of all that is sent here, the largest part is there twice at a time: raw and read


@dataclass(frozen=True, slots=True)
class Bad:
    """One request. `says`: what the message or the field must name."""

    says: str
    body: Any = None  # bytes as they are, anything else as JSON
    status: int = 400
    path: str = TEXT
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)


def text(says: str, status: int = 400, **fields: Any) -> Bad:
    return Bad(says, {"prompt": "x", "max_tokens": 1} | fields, status)


def chat(says: str, **fields: Any) -> Bad:
    return Bad(says, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1} | fields, path=CHAT)


def raw(says: str, body: bytes, status: int = 400, **headers: str) -> Bad:
    return Bad(says, body, status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def schema(says: str, value: Any, **more: Any) -> Bad:
    return chat(says, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}}, **more)


def nested(levels: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


def tool(parameters: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


GIF = "data:image/gif;base64,%%%not-base64%%%"
BAD: dict[str, Bad] = {
    # JSON and its text
    "no body": raw("JSON", b""),
    "no JSON": raw("JSON", b"prompt=x"),
    "cut JSON": raw("JSON", b'{"prompt": "x"'),
    "two values": raw("JSON", b'{"prompt": "x"} {"prompt": "y"}'),
    "trailing comma": raw("JSON", b'{"prompt": "x",}'),
    "a list": raw("object", b'["x"]'),
    "a string": raw("object", b'"x"'),
    "null": raw("object", b"null"),
    "invalid UTF-8": raw("JSON", b'{"prompt": "\xff\xfe"}'),
    "overlong UTF-8": raw("JSON", b'{"prompt": "\xc0\xaf"}'),
    "UTF-16": raw("JSON", '{"prompt": "x"}'.encode("utf-16")),
    "lone surrogate": raw("JSON", b'{"prompt": "\\ud800"}'),
    "control character": raw("JSON", b'{"prompt": "a\x00b"}'),
    "a key twice": raw("prompt", b'{"prompt": "x", "prompt": "y"}'),
    "deep nesting": raw("JSON", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "many objects": raw("objects", b'{"x": [' + b"{}," * 150_000 + b"{}]}"),
    "huge number": raw("JSON", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}"),
    "NaN": raw("JSON", b'{"prompt": "x", "temperature": NaN}'),
    "infinity": raw("JSON", b'{"prompt": "x", "temperature": -Infinity}'),
    "1e999": raw("temperature", b'{"prompt": "x", "temperature": 1e999}'),
    # sizes and kinds
    "body too large": raw("bytes", b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}', 413),
    "form": raw("content-type", b"prompt=x", 415, content_type="application/x-www-form-urlencoded"),
    "compressed": raw("content-encoding", b"\x1f\x8b", 415, content_encoding="gzip"),
    "latin-1": raw("charset", b"{}", 415, content_type="application/json; charset=latin-1"),
    "prompt too long": text("prompt", prompt="x" * 200_000),
    "ids too long": text("prompt", prompt=[1] * 100_000),
    "max_tokens beyond the context": text("max_tokens", max_tokens=10**9),
    "10**400 tokens": text("max_tokens", max_tokens=10**400),
    # wrong types and ranges
    "no prompt": Bad("prompt", {"max_tokens": 1}),
    "prompt is null": text("prompt", prompt=None),
    "prompt is an object": text("prompt", prompt={"text": "x"}),
    "prompt is empty": text("prompt", prompt=""),
    "prompt is no id": text("prompt", prompt=[1.5]),
    "negative id": text("prompt", prompt=[-1]),
    "id outside": text("prompt", prompt=[10**6]),
    "id of 2**64": text("prompt", prompt=[2**64]),
    "mixed prompts": text("prompt", prompt=["x", 1]),
    "many prompts": text("prompt", prompt=["x"] * 1000),
    "max_tokens is text": text("max_tokens", max_tokens="5"),
    "max_tokens is true": text("max_tokens", max_tokens=True),
    "max_tokens is 0.5": text("max_tokens", max_tokens=0.5),
    "negative max_tokens": text("max_tokens", max_tokens=-1),
    "negative temperature": text("temperature", temperature=-0.5),
    "temperature is a list": text("temperature", temperature=[1]),
    "top_p of 0": text("top_p", top_p=0),
    "n of 0": text("n", n=0),
    "n of a million": text("n", n=10**6),
    "best_of": text("best_of", best_of=5),
    "logprobs of 1000": text("logprobs", logprobs=1000),
    "seed of 2**70": text("seed", seed=2**70),
    "bias is a list": text("logit_bias", logit_bias=[1]),
    "bias of a word": text("logit_bias", logit_bias={"x": 1}),
    "bias too big": text("logit_bias", logit_bias={"1": 1e9}),
    "many biases": text("logit_bias", logit_bias={str(one): 1 for one in range(20_000)}),
    "empty stop": text("stop", stop=""),
    "stop is a number": text("stop", stop=[5]),
    "many stops": text("stop", stop=["x"] * 1000),
    "endless stop": text("stop", stop="x" * 100_000),
    "stream is text": text("stream", stream="yes"),
    "unknown model": text("model", 404, model="gpt-nope"),
    "id with line ends": text("request_id", request_id="a\r\nx: y"),
    "a window of a year": Bad("resume", {"prompt": "x"}, headers={"x-resume-window": "3e7"}),
    "a deadline that is none": Bad("deadline", {"prompt": "x"}, headers={"x-deadline-ms": "soon"}),
    "a negative deadline": Bad("deadline", {"prompt": "x"}, headers={"x-deadline-ms": "-5"}),
    "a tenant with spaces": Bad("tenant", {"prompt": "x"}, headers={"x-tandem-tenant": "a b"}),
    # conversations
    "no messages": chat("messages", messages=[]),
    "messages is text": chat("messages", messages="x"),
    "unknown role": chat("messages", messages=[{"role": "wizard", "content": "x"}]),
    "content is a number": chat("messages[0].content", messages=[{"role": "user", "content": 5}]),
    "an image": chat("messages[0].content", messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": GIF}}]}]),
    "sound in bad base64": chat("messages[0].content", messages=[{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}]}]),
    "tool without a name": chat("tools[0]", tools=[{"type": "function", "function": {}}]),
    "tool choice without tools": chat("tool_choice", tool_choice="required"),
    "unknown tool": chat("tool_choice", tools=tool({"type": "object"}), tool_choice={
        "type": "function", "function": {"name": "g"}}),
    "schema of a tool is a list": chat("tools[0].function.parameters", tools=tool([1])),
    "top_logprobs alone": chat("top_logprobs", top_logprobs=5),
    "audio out": chat("modalities", modalities=["audio"]),
    # constraints
    "two constraints": text("guided", guided_regex="a", guided_choice=["a"]),
    "a deep schema": schema("response_format", nested(100)),
    "a schema of wide choices": schema("response_format", {"enum": list(range(50_000))}),
    "an unknown keyword": schema("response_format", {"type": "string", "nullable": True}),
    "a schema that is text": schema("schema", 5),
    "a reference to nowhere": schema("response_format", {"$ref": "http://169.254.169.254/latest"}),
    "a reference to itself": schema("response_format", {"$ref": "#"}),
    "no regex": text("guided_regex", guided_regex="(a"),
    "a regex of a million": text("guided_regex", guided_regex="(a{1000}){1000}"),
    "a catastrophic regex": text("guided_regex", guided_regex="(" * 50 + "a*" + ")*" * 50 + "b"),
    "a long regex": text("guided_regex", guided_regex="a?" * 20_000),
    "no grammar": text("guided_grammar", guided_grammar="root ::= ("),
    "a grammar without a root": text("guided_grammar", guided_grammar='a ::= "x"'),
    "no choices": text("guided_choice", guided_choice=[]),
    # routes, methods, headers
    "no such route": Bad("/v1/nope", {}, 404, "/v1/nope"),
    "traversal": Bad("", {}, 404, "/v1/../../etc/passwd"),
    "wrong method": Bad("", None, 405, TEXT, "GET"),
    "no such stream": Bad("", None, 404, "/v1/streams/nobody", "GET"),
    "token ids that are text": Bad("tokens", {"tokens": "x"}, path="/detokenize"),
    # callers
    "no credential": Bad("", {"prompt": "x"}, 401, headers={"authorization": ""}),
    "wrong key": Bad("", {"prompt": "x"}, 401, headers={"authorization": "Bearer tnd-" + "0" * 43}),
    "another scheme": Bad("", {"prompt": "x"}, 401, headers={"authorization": "Basic eDp5"}),
    "huge credential": Bad("", {"prompt": "x"}, 401, headers={"authorization": "Bearer " + "x" * 20_000}),
}  # fmt: skip


def tokens(doors: GatewayDoors) -> dict[str, Bad]:
    """Tokens that nobody may come in with."""
    issuer = doors.issuer
    bearers = {
        "expired": issuer.token(exp=1_000_000_000),
        "not yet": issuer.token(nbf=10_000_000_000),
        "for somebody else": issuer.token(aud="other"),
        "by somebody else": issuer.token(iss="https://evil.example"),
        "without an end": issuer.token(exp=None),
        "alg none": forged({"alg": "none", "typ": "JWT"}, claims()),
        "alg None": forged({"alg": "None", "kid": "rsa"}, claims()),
        "HMAC with the public key": forged({"alg": "HS256", "kid": "rsa"}, claims(), issuer.public_pem()),
        "unknown kid": issuer.token(header={"kid": "../../dev/null"}),
        "claims are a list": forged({"alg": "none"}, [1]),
    }
    return {
        f"token {name}": Bad("", {"prompt": "x"}, 401, headers={"authorization": f"Bearer {token}"})
        for name, token in bearers.items()
    }


async def refused(doors: GatewayDoors, name: str, bad: Bad) -> None:
    """Send it; it must be refused as the table says, in OpenAI's words, naming what is wrong."""
    content = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
    headers = {"content-type": "application/json", **bad.headers}
    response = await doors.http.request(
        bad.method, bad.path, content=content if bad.method == "POST" else None, headers=headers
    )
    assert response.status_code == bad.status, f"{name}: {response.status_code} {response.text[:500]}"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, name
    assert bad.says.lower() in f"{error['param']} {error['message']}".lower(), f"{name}: {error}"
    assert len(response.content) < 5000, f"{name}: what was wrong is not sent back whole"


async def test_every_bad_request_is_told_what_is_wrong_and_harms_nobody(tmp_path: Path) -> None:
    grammar = {"compile_timeout_s": 2.0}
    async with gateway_doors(tmp_path, grammar=grammar, http={"max_body_bytes": MAX_BODY_BYTES}) as doors:
        table = BAD | tokens(doors)
        assert len(table) >= 60
        # What is loaded once, at the first constraint, is no growth.
        good = {"prompt": "x", "max_tokens": 1, "guided_choice": ["a", "b"]}
        assert (await doors.http.post(TEXT, json=good)).status_code == 200
        before, submits, peak = await doors.metric("tandem_gateway_requests_total"), doors.submits, doors.peak_mib()

        async def send_all() -> None:
            for name, bad in table.items():
                await refused(doors, name, bad)

        num_good = await doors.ask_while(send_all())
        assert num_good >= 2
        after = await doors.metric("tandem_gateway_requests_total")
        assert after - before == 2 * num_good, "good ones are all that was let in"
        assert doors.submits - submits == 2 * num_good, "and all that came to a worker"
        assert await doors.metric("tandem_gateway_active_requests") == 0
        assert doors.peak_mib() - peak < MAX_GROWTH_MIB


HEADS: dict[str, tuple[bytes, bytes]] = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00", b"400"),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
    "no such version": (b"GET /live HTTP/9.9\r\nhost: x\r\n\r\n", b"400"),
    "a line end in a name": (b"GET /live HTTP/1.1\r\nho\nst: x\r\n\r\n", b"400"),
    "a space before the colon": (b"GET /live HTTP/1.1\r\nhost : x\r\n\r\n", b"400"),
    "a null in a value": (b"GET /live HTTP/1.1\r\nhost: a\0b\r\n\r\n", b"400"),
    "a folded header": (b"GET /live HTTP/1.1\r\nhost: x\r\n y: z\r\n\r\n", b"400"),
    "two lengths": (b"POST /tokenize HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}", b"400"),
    "length and chunks": (
        b"POST /tokenize HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    "a negative length": (b"POST /tokenize HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"400"),
    "a length of words": (b"POST /tokenize HTTP/1.1\r\ncontent-length: ten\r\n\r\n", b"400"),
    "a chunk that is none": (b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n", b"400"),
    "a huge header": (b"GET /live HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", b"431"),
    "many headers": (b"GET /live HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % n for n in range(9000)) + b"\r\n", b"431"),
    "a huge URL": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"431"),
    "slow head": (b"GET /live HTTP/1.1\r\nhost: x\r\n", b"408"),
    "slow body": (b"POST /tokenize HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{", b"408"),
}  # fmt: skip
NUM_SLOW = 200


async def test_connections_that_break_the_rules_or_say_nothing(tmp_path: Path) -> None:
    short = {"header_timeout_s": 1.0, "body_timeout_s": 1.0}
    async with gateway_doors(tmp_path, http=short) as doors:
        host, _, port = doors.http_address.rpartition(":")
        files = doors.num_files()

        async def say(data: bytes, status: bytes) -> None:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                data.replace(b"HTTP/1.1\r\n", f"HTTP/1.1\r\nauthorization: {doors.authorization}\r\n".encode())
            )
            async with asyncio.timeout(PATIENCE_S):
                answer = await reader.read()
            writer.transport.abort()
            assert answer.startswith(b"HTTP/1.1 " + status), (data[:60], answer[:300])
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"connection: close" in head.lower(), data[:60]
            assert b"\r\ny: z" not in head
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

        async def trickle() -> None:
            """A head that never ends, a few bytes at a time."""
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /live HTTP/1.1\r\n")
            gone = asyncio.create_task(reader.read())
            while not gone.done() and not writer.is_closing():
                writer.write(b"a: b\r\n")
                await asyncio.wait([gone], timeout=0.1)
            assert (await gone)[:12] in (b"HTTP/1.1 408", b"")
            writer.transport.abort()

        async def half_closed() -> None:
            """It asks, and says that it will say no more: it may still want to listen."""
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 50\r\n\r\n{")
            writer.write_eof()
            async with asyncio.timeout(PATIENCE_S):
                await reader.read()
            writer.transport.abort()

        async def all_of_them() -> None:
            await asyncio.gather(
                *(say(data, status) for data, status in HEADS.values()),
                *(trickle() for _ in range(NUM_SLOW)),
                *(half_closed() for _ in range(20)),
            )

        assert await doors.ask_while(all_of_them()) >= 2, "others were served while slow ones were waited for"
        await doors.until(lambda: doors.num_files() <= files + 2)
