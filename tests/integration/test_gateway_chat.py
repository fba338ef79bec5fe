"""Conversations over gRPC in front of fake workers: what the template is given, and the calls read out of the text."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from core.request import Finish, FinishReason
from core.rpc import field_violations
from protos import inference_pb2 as pb
from protos import worker_pb2
from tests.fakes.checkpoint import write_checkpoint
from tests.fakes.cluster import FakeCluster, fake_cluster
from tests.fakes.script import PATIENCE_S, Reply

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    "Answer with <tool_call>{name, arguments}</tool_call>.{% endif %}"
    "{% for message in messages %}<user>{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}({{ call.function.arguments | tojson }})]"
    "{% endfor %}{% endfor %}<assistant>{% if enable_thinking %}think{% endif %}"
)
WEATHER = pb.Tool(name="weather", parameters='{"type": "object", "properties": {"city": {"type": "string"}}}')
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose template shows the model its tools."""
    folder = write_checkpoint(tmp_path_factory.mktemp("talkative"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def speaking(*texts: str) -> Any:
    """Workers that say one of these, by the request's seed."""

    def reply(request: worker_pb2.WorkRequest) -> Reply:
        text = texts[request.sampling.seed % len(texts)]
        ids = tuple(byte - 33 if 33 <= byte < 127 else _ODD[byte] for byte in text.encode())
        return Reply(ids, Finish(FinishReason.STOP))

    return reply


_ODD = {ord("\n"): 198, ord(" "): 220}  # the byte alphabet's places of what is no graphic character


def chat_request(*messages: pb.ChatMessage, **fields: Any) -> pb.ChatRequest:
    sampling = pb.SamplingParams(temperature=1.0, seed=0, max_tokens=200)
    said = messages or (pb.ChatMessage(role="user", content="hi"),)
    return pb.ChatRequest(messages=said, **{"sampling": sampling, **fields})


async def read(call: "grpc.aio.UnaryStreamCall[pb.ChatRequest, pb.ChatResponse]") -> list[pb.ChatResponse]:
    async with asyncio.timeout(PATIENCE_S):
        return [event async for event in call]


def content_of(events: Sequence[pb.ChatResponse], choice: int = 0) -> str:
    return "".join(one.delta.content for one in events if one.delta.choice == choice)


def calls_of(events: Sequence[pb.ChatResponse], choice: int = 0) -> list[tuple[str, dict[str, Any]]]:
    found: dict[int, list[str]] = {}
    for event in events:
        for call in event.delta.tool_calls if event.delta.choice == choice else ():
            parts = found.setdefault(call.index, ["", "", ""])
            for place, text in enumerate((call.id, call.name, call.arguments)):
                parts[place] += text
    assert all(parts[0] for parts in found.values()), "every call has an id"
    assert len({parts[0] for parts in found.values()}) == len(found)
    return [(parts[1], json.loads(parts[2])) for _, parts in sorted(found.items())]


def ends_of(events: Sequence[pb.ChatResponse]) -> dict[int, "pb.FinishReason.ValueType"]:
    return {event.finished.choice: event.finished.reason for event in events if event.HasField("finished")}


async def prompt_of(cluster: FakeCluster, index: int = -1) -> str:
    ids = cluster.prefills[0].submits[index].request.prompt_token_ids
    return cluster.gateway.front.tokenizer.decode(list(ids))


async def test_calls_and_content_are_told_apart_in_every_choice(talkative: Path) -> None:
    reply = speaking("Let me see." + CALL, "No need.")
    async with fake_cluster(talkative, reply=reply) as cluster:
        events = await read(cluster.inference.Chat(chat_request(tools=[WEATHER], n=2)))
    assert [event.event_index for event in events] == list(range(len(events)))
    assert (content_of(events, 0), calls_of(events, 0)) == ("Let me see.", [("weather", {"city": "Ulm"})])
    assert (content_of(events, 1), calls_of(events, 1)) == ("No need.", [])
    assert ends_of(events) == {0: pb.FINISH_REASON_TOOL_CALLS, 1: pb.FINISH_REASON_STOP}
    tokens = [token.index for event in events for token in event.delta.tokens if event.delta.choice == 0]
    assert tokens == list(range(len("Let me see." + CALL)))


async def test_two_calls_are_two_unless_only_one_is_wanted(talkative: Path) -> None:
    async with fake_cluster(talkative, reply=speaking(CALL + "\n" + CALL)) as cluster:
        both = await read(cluster.inference.Chat(chat_request(tools=[WEATHER])))
        one = await read(cluster.inference.Chat(chat_request(tools=[WEATHER], parallel_tool_calls=False)))
    assert len(calls_of(both)) == 2
    assert len(calls_of(one)) == 1


async def test_without_tools_and_with_none_all_is_content(talkative: Path) -> None:
    none = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE)
    async with fake_cluster(talkative, reply=speaking(CALL)) as cluster:
        for request in (chat_request(), chat_request(tools=[WEATHER], tool_choice=none)):
            events = await read(cluster.inference.Chat(request))
            assert (content_of(events), calls_of(events)) == (CALL, [])
            assert ends_of(events) == {0: pb.FINISH_REASON_STOP}
            assert "<tools>" not in await prompt_of(cluster)


async def test_the_template_is_given_all_of_it_and_tokenize_sees_the_same(talkative: Path) -> None:
    said = [
        pb.ChatMessage(role="user", content="hi"),
        pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="a", name="weather", arguments='{"city": "Ulm"}')]),
        pb.ChatMessage(role="tool", content="rain", tool_call_id="a"),
    ]
    arguments = '{"enable_thinking": true}'
    async with fake_cluster(talkative, reply=speaking("ok")) as cluster:
        await read(cluster.inference.Chat(chat_request(*said, tools=[WEATHER], chat_template_arguments=arguments)))
        prompt = await prompt_of(cluster)
        assert '"name": "weather"' in prompt
        assert "user:hi" in prompt
        assert '[weather({"city": "Ulm"})]' in prompt
        assert "tool:rain" in prompt
        assert prompt.endswith("think")
        request = pb.TokenizeRequest(
            chat=pb.ChatMessages(messages=said), tools=[WEATHER], chat_template_arguments=arguments
        )
        seen = await cluster.inference.Tokenize(request)
        assert list(seen.ids) == list(cluster.prefills[0].submits[0].request.prompt_token_ids)


async def test_a_forced_call_reaches_the_worker_as_a_constraint(talkative: Path) -> None:
    async with fake_cluster(talkative, reply=speaking(CALL)) as cluster:
        for choice in (pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED), pb.ToolChoice(name="weather")):
            events = await read(cluster.inference.Chat(chat_request(tools=[WEATHER], tool_choice=choice)))
            assert calls_of(events) == [("weather", {"city": "Ulm"})]
            sampling = cluster.prefills[0].submits[-1].request.sampling
            assert "weather" in sampling.constraint.structural_tag


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("tool-name", {"tools": [pb.Tool(name="a b")]}, "tools[0].name"),
    ("parameters", {"tools": [pb.Tool(name="a", parameters="{")]}, "tools[0].parameters"),
    ("twice", {"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ("unknown-tool", {"tools": [WEATHER], "tool_choice": pb.ToolChoice(name="time")}, "tool_choice"),
    ("no-tools", {"tool_choice": pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)}, "tool_choice"),
    ("mode", {"tools": [WEATHER], "tool_choice": pb.ToolChoice(mode=99)}, "tool_choice.mode"),  # type: ignore[arg-type]
    ("arguments", {"chat_template_arguments": "[]"}, "chat_template_arguments"),
    ("arguments-no-json", {"chat_template_arguments": "{"}, "chat_template_arguments"),
    ("role", {"messages": [pb.ChatMessage(content="x")]}, "messages[0].role"),
    (
        "call-name",
        {"messages": [pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall()])]},
        "messages[0].tool_calls[0].name",
    ),
]


async def test_bad_conversations_are_refused_by_field(talkative: Path) -> None:
    async with fake_cluster(talkative) as cluster:
        for name, fields, field in BAD:
            said = fields.get("messages", [pb.ChatMessage(role="user", content="hi")])
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await read(cluster.inference.Chat(pb.ChatRequest(**{"messages": said, **fields})))
            assert refused.value.code() is INVALID, name
            assert [found for found, _ in field_violations(refused.value)] == [field], name
        empty = cluster.inference.Chat(pb.ChatRequest())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await read(empty)
        assert [found for found, _ in field_violations(refused.value)] == ["messages"]
        assert cluster.prefills[0].submits == []


async def test_a_client_that_leaves_a_conversation_ends_it(talkative: Path) -> None:
    async with fake_cluster(talkative, reply=speaking("abcdefgh")) as cluster:
        cluster.decodes[0].script.go.clear()
        call = cluster.inference.Chat(chat_request(n=2))
        async with asyncio.timeout(PATIENCE_S):
            async for event in call:
                if event.HasField("delta"):
                    break
        call.cancel()
        await cluster.wait_idle()
        assert cluster.holds_nothing()


async def test_large_conversations_are_planned_beside_the_event_loop(talkative: Path) -> None:
    """To the same prompt, and to the same refusals."""
    async with (
        fake_cluster(talkative, reply=speaking(CALL)) as here,
        fake_cluster(talkative, reply=speaking(CALL), inline_prompt_bytes=0) as there,
    ):
        for cluster in (here, there):
            events = await read(cluster.inference.Chat(chat_request(tools=[WEATHER])))
            assert calls_of(events) == [("weather", {"city": "Ulm"})]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await read(cluster.inference.Chat(chat_request(tools=[pb.Tool(name="a b")])))
            assert [found for found, _ in field_violations(refused.value)] == ["tools[0].name"]
        prompts = [cluster.prefills[0].submits[0].request.prompt_token_ids for cluster in (here, there)]
        assert prompts[0] == prompts[1]


async def test_a_conversation_of_another_model_or_of_too_many_bytes_is_refused(talkative: Path) -> None:
    async with fake_cluster(talkative, max_prompt_bytes=1000) as cluster:
        for request, code in (
            (chat_request(model="gpt"), grpc.StatusCode.NOT_FOUND),
            (chat_request(pb.ChatMessage(role="user", content="x" * 1001)), INVALID),
            (chat_request(tools=[pb.Tool(name="a", description="x" * 1001)]), INVALID),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await read(cluster.inference.Chat(request))
            assert refused.value.code() is code
