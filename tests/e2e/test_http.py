"""OpenAI's API on a real cluster, by the clients that people have: the openai SDK, LangChain, and a fuzzer that knows
the OpenAPI document. The tests share one cluster."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import httpx
import openai
import pytest
import pytest_asyncio
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionNamedToolChoiceParam, ChatCompletionToolParam
from pydantic import BaseModel, SecretStr

from tests.e2e.cluster_process import PATIENCE_S, ClusterProcess, running_cluster, tandem, tiny_config

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(240)]
MODEL = "tiny"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You document code."},
    {"role": "user", "content": "Return the absolute path of a file."},
]
LOOK: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "enum": ["file", "path"]}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """What the model is made to say."""

    is_path: bool
    kind: str

    model_config = {"extra": "forbid"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClusterProcess]:
    config = tiny_config("http", replicas=1)
    async with running_cluster(tmp_path_factory.mktemp("run"), config) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: ClusterProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=cluster.record.http, api_key="none", max_retries=0) as client:
        await client.models.list()  # the first request asks in a thread what platform this is
        yield client


async def test_the_command_says_where_it_is(cluster: ClusterProcess) -> None:
    code, out, _ = await tandem(cluster.folder, "status", "--json")
    url = json.loads("\n".join(out))["http"]
    assert (code, url) == (0, cluster.record.http)
    async with httpx.AsyncClient(base_url=url.removesuffix("/v1"), trust_env=False) as plain:
        assert (await plain.get("/ready")).json() == {"status": "ready"}


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "tandem"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-9")


async def test_a_chat_whole_and_streamed_is_the_same(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=24
    )
    message = whole.choices[0].message
    assert message.content
    assert message.role == "assistant"
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].system_fingerprint == whole.system_fingerprint


async def test_a_completion_whole_and_streamed_is_the_same(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(
        model=MODEL, prompt=["def main(", "class "], n=2, seed=7, max_tokens=12, logprobs=3
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = ["", "", "", ""]
    async for chunk in await client.completions.create(
        model=MODEL, prompt=["def main(", "class "], n=2, seed=7, max_tokens=12, logprobs=3, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or ()) == len(choice.logprobs.top_logprobs or ()) <= 12


async def test_an_echoed_prompt_is_scored(client: openai.AsyncOpenAI) -> None:
    """As lm-eval-harness scores an answer: the prompt and the answer in it, and nothing generated."""
    reply = await client.completions.create(
        model=MODEL, prompt="Return the path.", echo=True, logprobs=2, max_tokens=0, temperature=0
    )
    choice = reply.choices[0]
    assert choice.text == "Return the path."
    assert choice.logprobs is not None
    scores: list[float | None] | None = cast("list[float | None] | None", choice.logprobs.token_logprobs)
    assert scores is not None
    assert scores[0] is None  # nothing came before it
    assert all(score is not None and score <= 0 for score in scores[1:])
    offsets = choice.logprobs.text_offset
    assert offsets is not None
    assert [
        choice.text[start:].startswith(word) for start, word in zip(offsets, choice.logprobs.tokens or (), strict=True)
    ]
    assert offsets == sorted(offsets)


async def test_a_prompt_is_scored_as_vllm_tells_it(client: openai.AsyncOpenAI) -> None:
    said = {"prompt_logprobs": 2}
    chat = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, temperature=0, extra_body=said
    )
    scores = (chat.model_extra or {})["prompt_logprobs"]
    assert chat.usage is not None
    assert len(scores) == chat.usage.prompt_tokens
    assert scores[0] is None
    assert all(len(one) in (2, 3) and all(top["logprob"] <= 0 for top in one.values()) for one in scores[1:])
    text = await client.completions.create(
        model=MODEL, prompt="Return the path.", max_tokens=2, temperature=0, extra_body=said
    )
    told = (text.choices[0].model_extra or {})["prompt_logprobs"]
    assert told[0] is None
    assert all(told[1:])


async def test_the_sync_client(cluster: ClusterProcess) -> None:
    with ThreadPoolExecutor(1) as thread:
        await asyncio.get_running_loop().run_in_executor(thread, use_sync_client, cluster.record.http)


def use_sync_client(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=8, logprobs=True
        )
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content
        stream = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=8, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
        assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")


async def test_a_named_tool_is_called(client: openai.AsyncOpenAI) -> None:
    choice: ChatCompletionNamedToolChoiceParam = {"type": "function", "function": {"name": "look_up"}}
    reply = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=[LOOK],
        tool_choice=choice,
        temperature=0,
        max_tokens=64,
    )
    calls = reply.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.name == "look_up"
    assert json.loads(calls[0].function.arguments)["word"] in ("file", "path")


async def test_a_required_call_streams(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=[LOOK], tool_choice="required", parallel_tool_calls=False,
        temperature=0, max_tokens=64,
    ) as stream:  # fmt: skip
        arguments = ""
        async for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                arguments += event.arguments_delta
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.arguments == arguments
    assert json.loads(arguments)["word"] in ("file", "path")
    assert final.choices[0].finish_reason == "tool_calls"
    after = await client.chat.completions.create(
        model=MODEL,
        messages=[
            *MESSAGES,
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": calls[0].id, "type": "function", "function": {"name": "look_up", "arguments": arguments}}
                ],
            },
            {"role": "tool", "tool_call_id": calls[0].id, "content": "a name of a file"},
        ],
        tools=[LOOK], temperature=0, max_tokens=8,
    )  # fmt: skip
    assert after.usage is not None


async def test_an_answer_is_parsed(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Verdict, temperature=0, max_tokens=256,
        extra_body={"stop": None},
    )  # fmt: skip
    choice = reply.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Verdict)


@pytest.mark.parametrize(
    ("extra", "allowed"),
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"guided_regex": "[ab]{3}"}, None),
        ({"structured_outputs": {"grammar": 'root ::= "left" | "right"'}}, {"left", "right"}),
    ],
    ids=["choice", "regex", "grammar"],
)
async def test_guided_answers(client: openai.AsyncOpenAI, extra: dict[str, object], allowed: set[str] | None) -> None:
    reply = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=1, seed=3, max_tokens=16, extra_body=extra
    )
    text = reply.choices[0].message.content
    assert text is not None
    assert text in allowed if allowed else set(text) <= {"a", "b"}


async def test_a_client_that_leaves_frees_everything(cluster: ClusterProcess, client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="def", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    await stream.close()
    status = await cluster.until_status(lambda status: status.active_requests == 0)
    assert all(worker.num_running == 0 for worker in status.workers) or await cluster.until_status(
        lambda status: all(worker.num_running == 0 for worker in status.workers)
    )


async def test_langchain(cluster: ClusterProcess) -> None:
    model = ChatOpenAI(
        model=MODEL, base_url=cluster.record.http, api_key=SecretStr("none"), temperature=0, max_retries=0,
        max_completion_tokens=24,
    )  # fmt: skip
    whole = await model.ainvoke([HumanMessage("Return the path.")])
    assert isinstance(whole, AIMessage)
    pieces = [piece async for piece in model.astream([HumanMessage("Return the path.")])]
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0

    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        return word

    called = await model.bind_tools([look_up], tool_choice="look_up").bind(max_completion_tokens=200).ainvoke("a file")
    assert isinstance(called, AIMessage)
    assert [call["name"] for call in called.tool_calls or called.invalid_tool_calls] == ["look_up"]


async def test_a_fuzzer_finds_nothing(cluster: ClusterProcess, tmp_path: Path) -> None:
    """schemathesis, against our own document: no 5xx, no undocumented status, no reply of another shape."""
    url = cluster.record.http.removesuffix("/v1")
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--max-time", "30", "--workers", "2",
        "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--no-color",
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()
    await cluster.until_status(lambda status: status.active_requests == 0)
