"""What the HTTP surface answers, in every shape: against fake workers that say the alphabet."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from core.errors import RejectedError, RejectReason
from core.request import Finish, FinishReason
from protos import worker_pb2
from router.http import reply_types as replies
from tests.fakes.cluster import fake_cluster
from tests.fakes.http import CHAT, DONE, TEXT, events_of, http_client
from tests.fakes.script import Reply, refusal

TINY = Path(__file__).parents[2] / "models" / "tiny"
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


def byte_ids(text: str) -> tuple[int, ...]:
    """Return the ids of a byte tokenizer (see checkpoint.py) for printable ASCII."""
    return tuple(ord(character) - 33 for character in text)


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], **more: Any) -> Any:
    """Return a whole reply, held to OpenAI's own types and to ours."""
    response = await client.post(path, json=body | more)
    assert response.status_code == 200, response.text
    reply = response.json()
    theirs, ours = (ChatCompletion, replies.ChatCompletion) if path == CHATS else (Completion, replies.Completion)
    theirs.model_validate(reply, strict=True)
    hold_to(ours, reply)
    return reply


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], **more: Any) -> list[Any]:
    """Return the chunks of a stream that ended well, held to OpenAI's own types and to ours."""
    response = await client.post(path, json=body | more | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last = events_of(response.text)
    assert last == DONE
    for chunk in chunks:
        if path == CHATS:
            ChatCompletionChunk.model_validate(chunk, strict=True)
        hold_to(replies.ChatCompletionChunk if path == CHATS else replies.Completion, chunk)
    for name in ("id", "created", "model", "object", "system_fingerprint"):
        assert len({chunk[name] for chunk in chunks}) == 1
    return chunks


def hold_to(model: type[BaseModel], reply: Any) -> None:
    """The reply has the shape that the OpenAPI document promises, and nothing besides."""
    told = model.model_validate(reply, strict=True, extra="forbid")
    assert told.model_dump(exclude_unset=True) == reply


def deltas(chunks: list[Any], choice: int = 0) -> list[Any]:
    return [one["delta"] for chunk in chunks for one in chunk["choices"] if one["index"] == choice]


async def test_a_chat_in_one_piece_and_in_chunks(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        reply = await ask(client, CHATS, CHAT, model="fake")
        assert reply["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "abcde", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ]
        usage = reply["usage"]
        assert (usage["completion_tokens"], usage["total_tokens"]) == (5, usage["prompt_tokens"] + 5)
        assert reply["id"].startswith("chatcmpl-")
        chunks = await stream(client, CHATS, CHAT)
        said = deltas(chunks)
        assert said[0] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(delta["content"] for delta in said[1:-1]) == "abcde"
        assert all(set(delta) == {"content"} and delta["content"] for delta in said[1:-1])
        assert said[-1] == {}
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert all("usage" not in chunk for chunk in chunks)
        assert ["tandem" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        for account in (reply["tandem"], chunks[-1]["tandem"]):
            assert account["choices"][0]["decode_worker"] == "d0"
            assert account["choices"][0]["completion_tokens"] == 5


async def test_a_completion_in_one_piece_and_in_chunks(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        reply = await ask(client, TEXTS, TEXT)
        assert reply["choices"] == [{"index": 0, "text": "abcde", "logprobs": None, "finish_reason": "length"}]
        assert reply["id"].startswith("cmpl-")
        chunks = await stream(client, TEXTS, TEXT)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcde"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("path", "body"), [(CHATS, CHAT), (TEXTS, TEXT)])
async def test_usage_comes_last_and_alone(checkpoint: Path, path: str, body: dict[str, Any]) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        *chunks, last = await stream(client, path, body, stream_options={"include_usage": True}, n=2)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 10
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 10
        assert all(chunk["usage"] is None and "tandem" not in chunk for chunk in chunks)
        assert [choice["index"] for choice in last["tandem"]["choices"]] == [0, 1]
        options = {"include_usage": True, "continuous_usage_stats": True}
        counted = [
            chunk["usage"]["completion_tokens"] for chunk in await stream(client, path, body, stream_options=options)
        ]
        assert counted == sorted(counted)
        assert counted[-1] == 5


@pytest.mark.parametrize(("path", "body"), [(CHATS, CHAT), (TEXTS, TEXT)])
async def test_choices_are_sampled_with_seeds_in_a_row(checkpoint: Path, path: str, body: dict[str, Any]) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        asked: dict[str, Any] = body | {"n": 3, "seed": 1, "temperature": 1.0}
        reply = await ask(client, path, asked)
        chunks = await stream(client, path, asked)
        for number, text in enumerate(["bcdef", "cdefg", "defgh"]):
            choice = reply["choices"][number]
            assert choice["index"] == number
            assert (choice["message"]["content"] if path == CHATS else choice["text"]) == text
            said = [one for chunk in chunks for one in chunk["choices"] if one["index"] == number]
            assert "".join(one["delta"].get("content", "") if path == CHATS else one["text"] for one in said) == text
            assert [one["finish_reason"] for one in said if one["finish_reason"]] == ["length"]
        assert reply["usage"]["completion_tokens"] == 15


async def test_several_prompts_in_one_call(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        for prompt in (["hi", "there"], [list(byte_ids("hi")), list(byte_ids("there"))]):
            reply = await ask(client, TEXTS, TEXT, prompt=prompt, n=2, echo=True)
            texts = [(choice["index"], choice["text"]) for choice in reply["choices"]]
            assert texts == [(0, "hiabcde"), (1, "hiabcde"), (2, "thereabcde"), (3, "thereabcde")]
            assert reply["usage"]["prompt_tokens"] == 7
            chunks = await stream(client, TEXTS, TEXT, prompt=prompt, n=2, echo=True)
            for number, text in texts:
                said = [one["text"] for chunk in chunks for one in chunk["choices"] if one["index"] == number]
                assert "".join(said) == text
        assert (await ask(client, TEXTS, TEXT, prompt=list(byte_ids("hi"))))["choices"][0]["text"] == "abcde"


async def test_logprobs_of_completions(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        asked: dict[str, Any] = TEXT | {"logprobs": 1, "max_tokens": 3}
        told = (await ask(client, TEXTS, asked))["choices"][0]["logprobs"]
        assert told == {
            "tokens": ["a", "b", "c"],
            "token_logprobs": [-0.5, -0.5, -0.5],
            "top_logprobs": [{"!": -1.0, "a": -0.5}, {"!": -1.0, "b": -0.5}, {"!": -1.0, "c": -0.5}],
            "text_offset": [0, 1, 2],
        }
        pieces = [chunk["choices"][0]["logprobs"] for chunk in await stream(client, TEXTS, asked)]
        assert {name: [one for piece in pieces if piece for one in piece[name]] for name in told} == told
        named = await ask(client, TEXTS, asked, return_tokens_as_token_ids=True, return_token_ids=True)
        choice = named["choices"][0]
        ids = list(byte_ids("abc"))
        assert choice["logprobs"]["tokens"] == [f"token_id:{one}" for one in ids]
        assert (choice["token_ids"], choice["prompt_token_ids"]) == (ids, list(byte_ids("hello")))


async def test_logprobs_of_chats(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        asked: dict[str, Any] = CHAT | {"logprobs": True, "top_logprobs": 1, "max_tokens": 2}
        told = (await ask(client, CHATS, asked))["choices"][0]["logprobs"]["content"]
        assert told == [
            {
                "token": letter,
                "logprob": -0.5,
                "bytes": [ord(letter)],
                "top_logprobs": [{"token": "!", "logprob": -1.0, "bytes": [33]}],
            }
            for letter in "ab"
        ]
        chunks = await stream(client, CHATS, asked)
        pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [one for piece in pieces if piece for one in piece["content"]] == told
        bare = (await ask(client, CHATS, CHAT, logprobs=True, max_tokens=1))["choices"][0]["logprobs"]
        assert bare["content"][0]["top_logprobs"] == []


async def test_characters_of_several_tokens_and_the_tokens_themselves(checkpoint: Path) -> None:
    euro = "\u20ac!"
    alphabet = {byte: index for index, byte in enumerate(sorted(_byte_alphabet().values()))}
    ids = tuple(alphabet[_byte_alphabet()[byte]] for byte in euro.encode())
    async with (
        fake_cluster(checkpoint, reply=lambda _: Reply(ids)) as cluster,
        http_client(cluster) as client,
    ):
        reply = await ask(client, TEXTS, TEXT, max_tokens=4, logprobs=0)
        assert reply["choices"][0]["text"] == euro
        assert reply["choices"][0]["logprobs"]["text_offset"] == [0, 0, 0, 1]
        chunks = await stream(client, TEXTS, TEXT, max_tokens=4)
        said = [chunk["choices"][0]["text"] for chunk in chunks]
        assert said in (["\u20ac", "!"], [euro])  # what is no text yet is not told
        chat = await ask(client, CHATS, CHAT, max_tokens=4, logprobs=True)
        told = chat["choices"][0]["logprobs"]["content"]
        assert bytes(byte for token in told for byte in token["bytes"]).decode() == euro


def _byte_alphabet() -> dict[int, str]:
    """Byte to symbol, as byte-level tokenizers have it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}


async def test_stops(checkpoint: Path) -> None:
    def until_d(request: worker_pb2.WorkRequest) -> Reply:
        return Reply(byte_ids("abcd"), Finish(FinishReason.STOP, "cd"))

    async with fake_cluster(checkpoint, reply=until_d) as cluster, http_client(cluster) as client:
        for stop in ("cd", ["cd"]):
            reply = await ask(client, CHATS, CHAT, stop=stop)
            assert reply["choices"][0]["message"]["content"] == "ab"
            assert reply["choices"][0]["finish_reason"] == "stop"
        assert list(cluster.prefills[0].submits[0].request.sampling.stop) == ["cd"]


async def test_nothing_but_the_prompt(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        reply = await ask(client, TEXTS, TEXT, max_tokens=0, echo=True)
        assert reply["choices"][0]["text"] == "hello"
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == 0
        chunks = await stream(client, TEXTS, TEXT, max_tokens=0, echo=True)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"


async def test_request_ids_are_the_clients_or_new(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        mine = await client.post(TEXTS, json=TEXT, headers={"x-request-id": "mine-1"})
        assert (mine.headers["x-request-id"], mine.json()["id"]) == ("mine-1", "cmpl-mine-1")
        made = await client.post(TEXTS, json=TEXT)
        assert made.json()["id"] == f"cmpl-{made.headers['x-request-id']}"
        bad = await client.post(TEXTS, json=TEXT, headers={"x-request-id": "a b"})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "x-request-id")
        assert bad.headers["x-request-id"] != "a b"
        failed = await client.get("/nowhere", headers={"x-request-id": "mine-2"})
        assert (failed.status_code, failed.headers["x-request-id"]) == (404, "mine-2")


async def test_a_request_in_flight_keeps_its_id(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        cluster.prefills[0].script.go.clear()
        first = asyncio.create_task(client.post(TEXTS, json=TEXT, headers={"x-request-id": "same"}))
        await cluster.prefills[0].wait_submitted()
        second = await client.post(TEXTS, json=TEXT, headers={"x-request-id": "same"})
        assert (second.status_code, second.json()["error"]["type"]) == (409, "conflict_error")
        cluster.prefills[0].script.go.set()
        assert (await first).status_code == 200


async def test_equal_engines_have_equal_fingerprints(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        prints = {
            (await ask(client, path, body))["system_fingerprint"] for path, body in ((CHATS, CHAT), (TEXTS, TEXT))
        }
        assert len(prints) == 1
        assert prints.pop().startswith("fp_")


REFUSALS = {
    "busy": (refusal(RejectReason.QUEUE_FULL, retry_after_s=1.2), 429, "2", "rate_limit_error"),
    "limited": (RejectedError(RejectReason.RATE_LIMITED, "slow down"), 429, "1", "rate_limit_error"),
}


@pytest.mark.parametrize(("error", "status", "retry_after", "kind"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_refusal_is_a_status_with_the_time_to_come_back(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: RejectedError, status: int, retry_after: str, kind: str,
    is_stream: bool,
) -> None:  # fmt: skip
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:

        def refuse(*_: object) -> None:
            raise error

        monkeypatch.setattr(cluster.gateway.dispatcher, "check_admissible", refuse)
        response = await client.post(CHATS, json=CHAT | {"stream": is_stream})
        assert response.status_code == status
        assert response.headers["retry-after"] == retry_after
        told = response.json()["error"]
        assert (told["type"], told["code"]) == (kind, str(error.reason))


async def test_no_workers_is_unavailable(checkpoint: Path) -> None:
    async with (
        fake_cluster(checkpoint, num_decodes=0, no_workers_timeout_s=0.0) as cluster,
        http_client(cluster) as client,
    ):
        response = await client.post(CHATS, json=CHAT)
        assert (response.status_code, response.json()["error"]["type"]) == (503, "service_unavailable_error")
        assert "retry-after" in response.headers


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_failure_before_the_first_token_is_a_status(checkpoint: Path, is_stream: bool) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        cluster.prefills[0].script.failure = worker_pb2.WorkFailed(grpc_code="INTERNAL", reason="engine", detail="cold")
        response = await client.post(CHATS, json=CHAT | {"stream": is_stream})
        assert response.status_code >= 500
        assert response.headers["content-type"] == "application/json"
        assert response.json()["error"]["type"] in ("server_error", "service_unavailable_error")


async def test_a_failure_in_the_middle_ends_the_stream_with_an_error(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        worker = cluster.decodes[0]
        worker.steps_allowed = asyncio.Semaphore(1)
        async with client.stream("POST", TEXTS, json=TEXT | {"stream": True}) as response:
            assert response.status_code == 200
            texts = response.aiter_text()
            text = await anext(texts)
            await worker.kill()
            text += "".join([more async for more in texts])
        *_, last = events_of(text)
        assert last["error"]["type"] == "service_unavailable_error"
        assert "data: [DONE]" not in text
        await cluster.wait_idle()


STATUSES = {
    "no such route": ("GET", "/v2/models", 404, "unknown_url"),
    "no such model": ("GET", "/v1/models/gpt-9", 404, "model_not_found"),
    "a model with a slash": ("GET", "/v1/models/org/gpt-9", 404, "model_not_found"),
    "another method": ("GET", "/v1/completions", 405, "method_not_allowed"),
    "yet another method": ("POST", "/v1/models", 405, "method_not_allowed"),
    "a slash too many": ("POST", "/v1/completions/", 404, "unknown_url"),
    "a way out": ("GET", "/v1/models/../../etc/passwd", 404, "unknown_url"),
}


async def test_routes_that_are_none(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        for case, (method, path, status, code) in STATUSES.items():
            response = await client.request(method, path)
            told = response.json()["error"]
            assert (response.status_code, told["code"]) == (status, code), case
            assert set(told) == {"message", "type", "param", "code"}, case
            assert ("allow" in response.headers) is (status == 405), case


MEDIA = {
    "a form": ("application/x-www-form-urlencoded", {}),
    "text": ("text/plain", {}),
    "nothing": ("", {}),
    "another charset": ("application/json; charset=utf-16", {}),
    "compressed": ("application/json", {"content-encoding": "gzip"}),
}


async def test_media_types_that_are_none_of_ours(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        for case, (media_type, headers) in MEDIA.items():
            headers = headers | ({"content-type": media_type} if media_type else {})
            response = await client.post(CHATS, content=json.dumps(CHAT), headers=headers)
            assert response.status_code == 415, case
            assert "error" in response.json(), case


async def test_json_by_any_of_its_names(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        for media_type in ("application/json", "Application/JSON; Charset=UTF-8", "application/problem+json"):
            response = await client.post(CHATS, content=json.dumps(CHAT), headers={"content-type": media_type})
            assert response.status_code == 200


BAD_VALUES: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "temperature": (CHATS, CHAT | {"temperature": 1e6}, "temperature", None),
    "top_p": (CHATS, CHAT | {"top_p": 0}, "top_p", None),
    "stop": (CHATS, CHAT | {"stop": ["x"] * 17}, "stop", None),
    "bias": (CHATS, CHAT | {"logit_bias": {"99999": 1}}, "logit_bias", None),
    "a long answer": (CHATS, CHAT | {"max_tokens": 10_000}, "max_tokens", "context_length_exceeded"),
    "a long answer by its new name": (
        CHATS,
        {"messages": CHAT["messages"], "max_completion_tokens": 10_000},
        "max_completion_tokens",
        "context_length_exceeded",
    ),
    "a long prompt": (TEXTS, TEXT | {"prompt": "x" * 600}, "prompt", "context_length_exceeded"),
    "an empty prompt": (TEXTS, TEXT | {"prompt": ""}, "prompt", None),
    "an id beyond": (TEXTS, TEXT | {"prompt": [99_999]}, "prompt", None),
    "many answers": (TEXTS, TEXT | {"n": 129}, "n", None),
    "many answers to many": (TEXTS, TEXT | {"prompt": ["x", "y"], "n": 65}, "n", None),
    "no answers": (CHATS, CHAT | {"n": 0}, "n", None),
    "a role that the template refuses": (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, "messages", None),
    "no messages": (CHATS, {"messages": []}, "messages", None),
    "a priority": (CHATS, CHAT | {"priority": 11}, "priority", None),
    "a tool's name": (
        CHATS,
        CHAT | {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        None,
    ),
    "the name of what was called": (
        CHATS,
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "", "arguments": ""}}]}]},
        "messages[0].tool_calls[0].function.name",
        None,
    ),
}


async def test_values_out_of_range_are_named(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        for case, (path, body, param, code) in BAD_VALUES.items():
            for is_stream in (False, True):
                response = await client.post(path, json=body | {"stream": is_stream})
                assert response.status_code == 400, case
                told = response.json()["error"]
                assert (told["type"], told["param"], told["code"]) == ("invalid_request_error", param, code), case
                assert told["message"].startswith(param), case
        assert not cluster.prefills[0].submits


async def test_a_text_with_the_tokenizers_markers_and_without() -> None:
    async with fake_cluster(TINY) as cluster, http_client(cluster) as client:
        for extra, before in (({}, [1]), ({"add_special_tokens": True}, [1]), ({"add_special_tokens": False}, [])):
            told = (await client.post("/tokenize", json={"prompt": "def"} | extra)).json()
            assert told["tokens"][: len(before)] == before
            assert [one for one in told["tokens"] if one == 1] == before
            reply = await ask(client, TEXTS, {"prompt": "def", "max_tokens": 1, "return_token_ids": True} | extra)
            assert reply["choices"][0]["prompt_token_ids"] == told["tokens"]


async def test_tokens_of_texts_and_texts_of_tokens(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        response = await client.post("/tokenize", json={"prompt": "hi", "return_token_strs": True})
        told = response.json()
        hold_to(replies.Tokenized, told)
        ids = list(byte_ids("hi"))
        assert told == {"count": 2, "max_model_len": 512, "tokens": ids, "token_strs": ["h", "i"]}
        chat = (await client.post("/tokenize", json={"messages": CHAT["messages"]})).json()
        assert chat["count"] == (await ask(client, CHATS, CHAT))["usage"]["prompt_tokens"]
        assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "hi"}
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}, "prompt"),
            ("/tokenize", {"messages": CHAT["messages"], "add_special_tokens": True}, "add_special_tokens"),
            ("/detokenize", {"tokens": [99_999]}, "tokens"),
            ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ):
            refused = await client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_the_model_is_listed(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        listed = (await client.get("/v1/models")).json()
        hold_to(replies.ModelList, listed)
        card = (await client.get("/v1/models/fake")).json()
        assert listed["data"] == [card]
        assert (card["id"], card["max_model_len"]) == ("fake", 512)
