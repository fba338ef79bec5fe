"""Requests of clients, spoilt: JSON bodies, heads of HTTP, bytes of protobuf messages. Pure but for the generator."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from protos import inference_pb2 as pb

_WORDS = ("", "x", "\u0000", "\ud800", "\U0001f600" * 3, "a" * 3000, "../../x", "\r\nx: y", "NaN", "true", "[", "{{x}}")
_NUMBERS = (0, -0.0, 1, -1, 0.5, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63), 10**40, 1e-320)
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {"$ref": "#"},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#"}}}},
    {"anyOf": []},
    {"enum": []},
    {"type": ["string", "null"], "minLength": -1},
)
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_USER = {"role": "user", "content": "hello"}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": "", "messages": [_USER], "max_tokens": 2},
        {"messages": [_USER], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": [_USER], "max_tokens": 2, "tools": [_TOOL], "tool_choice": "auto", "n": 2, "logprobs": True},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "max_completion_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
        },
    ],
    "/v1/completions": [
        {"prompt": "hello", "max_tokens": 2, "logprobs": 1, "echo": True, "seed": 5, "stop": ["b"]},
        {"prompt": [[1, 2], [3]], "max_tokens": 2, "stream": True, "logit_bias": {"5": -1.5}},
        {"prompt": "x", "max_tokens": 2, "guided_regex": "a*b", "min_p": 0.1, "repetition_penalty": 1.1},
    ],
    "/tokenize": [{"prompt": "x"}, {"messages": [_USER]}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
MESSAGES: dict[str, list[bytes]] = {
    "Generate": [
        one.SerializeToString()
        for one in (
            pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=2, temperature=0.5, seed=1)),
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), n=2, sampling=pb.SamplingParams(max_tokens=2)),
            pb.GenerateRequest(
                text="x",
                request_id="fuzz",
                sampling=pb.SamplingParams(max_tokens=2, stop=["b"], logprobs=1, logit_bias={1: 1.0}),
                terms=pb.RequestTerms(tenant="", session_id="s", priority=1, slo=pb.Slo(ttft_s=1.0)),
            ),
            pb.GenerateRequest(
                text="x", sampling=pb.SamplingParams(max_tokens=2, constraint=pb.Constraint(regex="a*b"))
            ),
        )
    ],
    "Chat": [
        pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="x")],
            tools=[pb.Tool(name="f", parameters='{"type":"object"}')],
            sampling=pb.SamplingParams(max_tokens=2),
        ).SerializeToString()
    ],
    "Resume": [pb.ResumeRequest(request_id="fuzz", last_event_index=1).SerializeToString()],
    "Abort": [pb.AbortRequest(request_id="fuzz").SerializeToString()],
    "Tokenize": [pb.TokenizeRequest(text="hello", with_tokens=True).SerializeToString()],
    "Detokenize": [pb.DetokenizeRequest(ids=[1, 2, 3]).SerializeToString()],
    "GetModelInfo": [pb.GetModelInfoRequest().SerializeToString()],
}


@dataclass(frozen=True, slots=True)
class Spoilt:
    """One request. `path`: of HTTP, or the method of gRPC. `is_raw`: `content` is all of HTTP, its head, too."""

    door: str
    path: str
    content: bytes
    is_raw: bool = False


def spoil(rng: Random, authorization: str) -> Spoilt:
    """Draw a request of any kind."""
    kind = rng.random()
    if kind < 0.4:
        method = rng.choice(list(MESSAGES))
        return Spoilt("grpc", method, _bytes(rng, rng.choice(MESSAGES[method])))
    path = rng.choice(list(BODIES))
    body = copy.deepcopy(rng.choice(BODIES[path]))
    if kind < 0.8:
        for _ in range(rng.randint(1, 3)):
            _change(rng, body)
        return Spoilt("http", path, json.dumps(body).encode("utf-8", "surrogatepass"))
    content = json.dumps(body).encode()
    if kind < 0.9:
        return Spoilt("http", path, _bytes(rng, content))
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: {authorization}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    return Spoilt("http", path, _bytes(rng, head.encode() + content), is_raw=True)


def _change(rng: Random, value: Any) -> None:
    """Spoil something within an object or a list, in place."""
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        one = todo.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one)
        for key, inner in list(items):
            places.append((one, key))
            if isinstance(inner, dict | list):
                todo.append(inner)
    if not places:
        return
    holder, key = rng.choice(places)
    action = rng.random()
    if action < 0.1:
        del holder[key]
    elif action < 0.2 and isinstance(holder, dict):
        holder[rng.choice(_WORDS) or "name"] = holder[key]
    elif action < 0.3:
        holder[key] = [holder[key]] * rng.choice((0, 1, 2, 500))
    elif action < 0.35:
        for _ in range(rng.choice((3, 60, 400))):
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    else:
        holder[key] = rng.choice(_VALUES)(rng)


_VALUES: tuple[Callable[[Random], Any], ...] = (
    lambda rng: rng.choice(_WORDS),
    lambda rng: rng.choice(_NUMBERS),
    lambda rng: copy.deepcopy(rng.choice(_SCHEMAS)),
    lambda rng: copy.copy(rng.choice((None, True, False, [], {}))),
)


def _bytes(rng: Random, data: bytes) -> bytes:
    """Spoil some bytes; now and then, none."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 5, 20))):
        at = rng.randrange(len(spoilt) + 1)
        match rng.randrange(5):
            case 0 if spoilt:
                spoilt[at % len(spoilt)] = rng.randrange(256)
            case 1 if spoilt:
                spoilt[at % len(spoilt)] ^= 1 << rng.randrange(8)
            case 2:
                del spoilt[at : at + rng.randint(1, 8)]
            case 3:
                spoilt[at:at] = rng.randbytes(rng.randint(1, 8))
            case _:
                spoilt[at:at] = spoilt[at : at + rng.randint(1, 40)] * rng.choice((1, 3, 50))
    return bytes(spoilt)
