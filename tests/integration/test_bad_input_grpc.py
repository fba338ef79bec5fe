"""Malformed and hostile calls over gRPC, to a gateway process: each ends with a status that names what is wrong, none
reaches a worker, good calls beside them are served, and the process stays as small as it was."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from core.rpc import field_violations
from protos import inference_pb2 as pb
from tests.fakes.cluster import text_request
from tests.fakes.script import PATIENCE_S
from tests.gateway_process import GatewayDoors, gateway_doors
from tests.issuer import claims, forged

S = grpc.StatusCode
INVALID, LONG, NOBODY = S.INVALID_ARGUMENT, S.OUT_OF_RANGE, S.UNAUTHENTICATED
MAX_REQUEST_BYTES = 2**20
MAX_GROWTH_MIB = 128


@dataclass(frozen=True, slots=True)
class Bad:
    """One call. `says`: what the details must begin with; a field, where it is one."""

    code: grpc.StatusCode
    says: str
    message: Message | bytes
    method: str = "Generate"
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    is_field: bool = True


def text(says: str, code: grpc.StatusCode = INVALID, **sampling: Any) -> Bad:
    return Bad(code, says, pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**sampling)))


def constrained(says: str, **constraint: Any) -> Bad:
    return text(says, constraint=pb.Constraint(**constraint))


def terms(says: str, **said: Any) -> Bad:
    return Bad(INVALID, says, text_request(**said))


def chat(says: str, **fields: Any) -> Bad:
    messages = fields.pop("messages", [pb.ChatMessage(role="user", content="x")])
    return Bad(INVALID, says, pb.ChatRequest(messages=messages, **fields), "Chat")


def raw(data: bytes, method: str = "Generate") -> Bad:
    return Bad(INVALID, "request", data, method)


def caller(*values: str) -> Bad:
    return Bad(NOBODY, "", text_request(), metadata=tuple(("authorization", one) for one in values), is_field=False)


def deep(levels: int) -> str:
    return '{"type":"array","items":' * levels + "true" + "}" * levels


SCHEMA = "sampling.constraint.json_schema"
REGEX = "sampling.constraint.regex"
BAD: dict[str, Bad] = {
    "cut": raw(b"\xff\xff\xff"),
    "a length beyond the end": raw(b"\x1a\x7fabc"),
    "no UTF-8": raw(b"\x0a\x02\xff\xfe"),
    "groups without an end": raw(b"\x0b" * 200),
    "deep groups": raw(b"\x0b" * 5000 + b"\x0c" * 5000),
    "a varint without an end": raw(b"\x18" + b"\xff" * 20),
    "no chat": raw(b"\xff", "Chat"),
    "no abort": raw(b"\xff", "Abort"),
    "nothing": Bad(INVALID, "prompt", b""),
    "unknown fields alone": Bad(INVALID, "prompt", b"\xf8\x7f\x01"),
    "too large": Bad(S.RESOURCE_EXHAUSTED, "", b"\x1a\xff\xff\x7f" + b"x" * MAX_REQUEST_BYTES, is_field=False),
    "empty text": Bad(INVALID, "text", pb.GenerateRequest(text="")),
    "a long text": Bad(LONG, "prompt", text_request("x" * 100_000)),
    "no ids": Bad(INVALID, "token_ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
    "ids outside": Bad(INVALID, "token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1]))),
    "many ids": Bad(LONG, "prompt", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 200_000))),
    "unknown model": Bad(S.NOT_FOUND, "", text_request(model="gpt-nope"), is_field=False),
    "an id with line ends": Bad(INVALID, "request_id", text_request(request_id="a\r\nb")),
    "an id of a path": Bad(INVALID, "request_id", text_request(request_id="../../x")),
    "a million answers": Bad(INVALID, "n", text_request(n=10**6)),
    "NaN": text("sampling.temperature", temperature=float("nan")),
    "infinity": text("sampling.top_p", top_p=float("inf")),
    "negative": text("sampling.temperature", temperature=-1.0),
    "negative tokens": text("sampling.max_tokens", max_tokens=-(2**31)),
    "negative top_k": text("sampling.top_k", top_k=-1),
    "min over max": text("sampling.min_tokens", max_tokens=2, min_tokens=3),
    "NaN of a penalty": text("sampling.presence_penalty", presence_penalty=float("nan")),
    "NaN of a bias": text("sampling.logit_bias", logit_bias={1: float("nan")}),
    "many biases": text("sampling.logit_bias", logit_bias=dict.fromkeys(range(20_000), 1.0)),
    "many stops": text("sampling.stop", stop=["x"] * 10_000),
    "an endless stop": text("sampling.stop", stop=["x" * 100_000]),
    "many stop ids": text("sampling.stop_token_ids", stop_token_ids=[1] * 100_000),
    "many logprobs": text("sampling.logprobs", logprobs=10**6),
    "a quality that is none": terms("terms.kv_quality", kv_quality=pb.KvQuality(floor=float("nan"))),
    "an endless budget": terms("terms.handoff_budget_s", handoff_budget_s=float("inf")),
    "a window of a year": terms("terms.resume_window_s", resume_window_s=3e7),
    "a window of NaN": terms("terms.resume_window_s", resume_window_s=float("nan")),
    "a tenant with spaces": terms("terms.tenant", tenant="a b"),
    "a target of NaN": terms("terms.slo", slo=pb.Slo(ttft_s=float("nan"))),
    "a priority beyond": terms("terms.priority", priority=2**31 - 1),
    "no messages": chat("messages", messages=[]),
    "no role": chat("messages[0].role", messages=[pb.ChatMessage(content="x")]),
    "unknown role": chat("chat", messages=[pb.ChatMessage(role="wizard", content="x")]),
    "a tool without a name": chat("tools[0]", tools=[pb.Tool(parameters="{}")]),
    "a tool with bad parameters": chat("tools[0]", tools=[pb.Tool(name="f", parameters="{")]),
    "a tool with deep parameters": chat("tools[0]", tools=[pb.Tool(name="f", parameters=deep(5000))]),
    "a choice without tools": chat("tool_choice", tool_choice=pb.ToolChoice(name="f")),
    "bad template arguments": chat("chat_template_arguments", chat_template_arguments="[1]"),
    "deep template arguments": chat("chat_template_arguments", chat_template_arguments="[" * 100_000),
    "no JSON": constrained(SCHEMA, json_schema="{"),
    "NaN in a schema": constrained(SCHEMA, json_schema='{"const": NaN}'),
    "a deep schema": constrained(SCHEMA, json_schema=deep(100)),
    "a very deep schema": constrained(SCHEMA, json_schema=deep(2000)),
    "a wide schema": constrained(SCHEMA, json_schema=json.dumps({"enum": list(range(10_000))})),
    "a reference to nowhere": constrained(SCHEMA, json_schema='{"$ref": "file:///etc/passwd"}'),
    "no regex": constrained(REGEX, regex="(a"),
    "a regex of a million": constrained(REGEX, regex="(a{1000}){1000}"),
    "a catastrophic regex": constrained(REGEX, regex="(" * 50 + "a*" + ")*" * 50 + "b"),
    "a null in a regex": constrained(REGEX, regex="a\0b"),
    "no grammar": constrained("sampling.constraint.grammar", grammar="root ::= ("),
    "detokenize outside": Bad(INVALID, "ids", pb.DetokenizeRequest(ids=[2**32 - 1]), "Detokenize"),
    "tokenize nothing": Bad(INVALID, "input", pb.TokenizeRequest(), "Tokenize"),
    "resume nobody": Bad(S.NOT_FOUND, "", pb.ResumeRequest(request_id="nobody"), "Resume", is_field=False),
    "no such method": Bad(S.UNIMPLEMENTED, "", b"", "Nope", is_field=False),
    "wrong key": caller("Bearer tnd-" + "0" * 43),
    "another scheme": caller("Basic eDp5"),
    "two credentials": caller("Bearer a", "Bearer b"),
    "a huge credential": caller("Bearer " + "x" * 10_000),
}


def tokens(doors: GatewayDoors) -> dict[str, Bad]:
    """Tokens that nobody may come in with."""
    issuer = doors.issuer
    return {
        "expired": caller(f"Bearer {issuer.token(exp=1_000_000_000)}"),
        "for somebody else": caller(f"Bearer {issuer.token(aud='other')}"),
        "alg none": caller(f"Bearer {forged({'alg': 'none'}, claims())}"),
        "HMAC with the public key": caller(f"Bearer {forged({'alg': 'HS256'}, claims(), issuer.public_pem())}"),
    }


async def refused(doors: GatewayDoors, name: str, bad: Bad) -> None:
    """Call; it must end as the table says."""
    data = bad.message if isinstance(bad.message, bytes) else bad.message.SerializeToString()
    begin: Any = doors.channel.unary_stream(f"/tandem.v1.Inference/{bad.method}")
    call = begin(data, metadata=bad.metadata or (("authorization", doors.authorization),), timeout=PATIENCE_S)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        [message async for message in call]
    error = failure.value
    details = error.details() or ""
    assert error.code() is bad.code, f"{name}: {error.code()} {details[:300]}"
    assert details.startswith(bad.says), f"{name}: {details[:300]}"
    assert len(details) <= 2000, f"{name}: what was wrong is not sent back whole"
    if bad.is_field:
        fields = [found for found, _ in field_violations(error)]
        assert fields, f"{name}: {details[:300]}"
        assert fields[0].startswith(bad.says), f"{name}: {fields}"


async def test_every_bad_call_is_told_what_is_wrong_and_harms_nobody(tmp_path: Path) -> None:
    async with gateway_doors(tmp_path, max_request_bytes=MAX_REQUEST_BYTES) as doors:
        table = BAD | tokens(doors)
        assert len(table) >= 60
        # What is loaded once, at the first constraint, is no growth.
        good = {"prompt": "x", "max_tokens": 1, "guided_choice": ["a", "b"]}
        assert (await doors.http.post("/v1/completions", json=good)).status_code == 200
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


async def test_calls_that_send_twice_not_at_all_or_never_end(tmp_path: Path) -> None:
    async with gateway_doors(tmp_path) as doors:
        metadata = (("authorization", doors.authorization),)
        generate: Any = doors.channel.stream_stream("/tandem.v1.Inference/Generate")
        request = text_request(max_tokens=5).SerializeToString()
        files = doors.num_files()

        async def twice() -> None:
            """A method of one request gets two: the first is answered, unless the answer ends the call beneath the
            second, which then fails where it is sent."""
            call = generate(iter([request, b"\xff"]), metadata=metadata, timeout=PATIENCE_S)
            try:
                events = [pb.GenerateResponse.FromString(message) async for message in call]
            except grpc.aio.AioRpcError as error:
                if "execute_batch" not in (error.debug_error_string() or ""):
                    raise
            else:
                assert "".join(event.delta.text for event in events) == "abcde"

        async def none() -> None:
            call = generate(iter([]), metadata=metadata, timeout=PATIENCE_S)
            with pytest.raises(grpc.aio.AioRpcError):
                [message async for message in call]

        async def silence() -> None:
            """Opened, and nothing is sent until the client's own deadline."""
            call = generate(metadata=metadata, timeout=1.0)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                [message async for message in call]
            assert failure.value.code() is S.DEADLINE_EXCEEDED

        async def garbage() -> list[asyncio.StreamWriter]:
            """No HTTP/2 at all, and HTTP/2 that breaks off; they stay open."""
            host, _, port = doors.grpc_address.rpartition(":")
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            writers = []
            for data in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000), preface, preface + b"\xff" * 1000):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(data)
                writers.append(writer)
            return writers

        async def all_of_them() -> None:
            await asyncio.gather(*(one() for one in (twice, none, silence) for _ in range(20)))

        open_ones = await garbage()
        assert await doors.ask_while(all_of_them()) >= 2
        for writer in open_ones:
            writer.transport.abort()
        await doors.until(lambda: doors.num_files() <= files + 2)
        assert await doors.metric("tandem_gateway_active_requests") == 0
