"""What the client does when its connection breaks, is refused, or carries what should not be: nothing lost, nothing
twice, nothing begun anew after the first token."""

import asyncio
import json
from contextlib import aclosing

import pytest

from core.errors import RejectedError, RejectReason, StoreUnavailable
from core.rpc import reply_errors
from protos import inference_pb2 as pb
from tandem_client import (
    Client,
    FinishReason,
    Message,
    NamedTool,
    RequestNotFound,
    ServingError,
    Tool,
    ToolCall,
    WorkerLost,
    json_schema,
)
from tests.fakes.inference import (
    ScriptedInference,
    breaks_after,
    events,
    knows_nothing,
    resumed,
    says,
    scripted_gateway,
)
from tests.fakes.script import PATIENCE_S


async def test_a_broken_stream_is_read_on_where_it_was() -> None:
    told: list[str] = []
    async with (
        scripted_gateway() as (gateway, address),
        Client(address, tenant="lab", api_key="tnd-key", on_retry=lambda error, _: told.append(str(error))) as client,
    ):
        gateway.generates = [breaks_after(*events("a", "b", ends=False))]
        gateway.resumes = [
            breaks_after(),
            breaks_after(*resumed(*events("a", "b", "c", first=3, ends=False))),
            says(*resumed(*events("a", "b", "c", "d", first=4))),
        ]
        generation = await client.generate_text("x", resume_window_s=30.0)
        assert generation.text == "abcd"
        assert [token.index for token in generation.tokens] == [0, 1, 2, 3]
        first, *resumes = gateway.asked
        assert first.request_id.startswith("req-")
        assert first.terms.resume_window_s == 30.0
        assert [one.last_event_index for one in resumes] == [2, 2, 3]
        assert {(one.request_id, one.tenant) for one in resumes} == {(first.request_id, "lab")}
        assert all(one["authorization"] == "Bearer tnd-key" for one in gateway.metadata)
        assert told == ["Socket closed"] * 3
        assert gateway.aborted == []


async def test_events_that_come_again_are_told_once_and_a_gap_is_an_error() -> None:
    async with scripted_gateway() as (gateway, address), Client(address) as client:
        gateway.generates = [breaks_after(*events("a", "b", ends=False))] * 2
        gateway.resumes = [
            says(*resumed(*events("a", "b", "c", first=1))),
            says(*resumed(*events("a", "b", "c", first=4))),
        ]
        assert (await client.generate_text("x", resume_window_s=30.0)).text == "abc"
        with pytest.raises(ServingError, match="left out event 3"):
            await client.generate_text("x", resume_window_s=30.0)


async def test_lost_before_the_first_event_it_asks_before_it_begins_anew() -> None:
    async with scripted_gateway() as (gateway, address), Client(address) as client:
        gateway.generates = [breaks_after(), breaks_after(), says(*events("n"))]
        gateway.resumes = [says(*resumed(*events("o"))), knows_nothing]
        assert (await client.generate_text("x", resume_window_s=30.0)).text == "o", "it had begun"
        assert (await client.generate_text("x", resume_window_s=30.0)).text == "n", "it had not"
        resumes = [one for one in gateway.asked if isinstance(one, pb.ResumeRequest)]
        assert not any(one.HasField("last_event_index") for one in resumes)


async def test_what_is_gone_is_not_begun_anew_after_the_first_event() -> None:
    async with scripted_gateway() as (gateway, address), Client(address) as client:
        gateway.generates = [breaks_after(*events("a", ends=False))]
        gateway.resumes = [knows_nothing]
        with pytest.raises(RequestNotFound):
            await client.generate_text("x", resume_window_s=30.0)


async def test_without_a_window_a_broken_stream_is_the_end() -> None:
    async with scripted_gateway() as (gateway, address), Client(address) as client:
        gateway.generates = [breaks_after(*events("a", ends=False))]
        with pytest.raises(WorkerLost, match="Socket closed"):
            await client.generate_text("x")
        assert len(gateway.asked) == 1


async def test_a_window_that_is_over_is_the_end() -> None:
    async with scripted_gateway() as (gateway, address), Client(address) as client:
        gateway.generates = [breaks_after(*events("a", ends=False))]
        gateway.resumes = [breaks_after()] * 100
        with pytest.raises(WorkerLost, match="Socket closed"):
            await client.generate_text("x", resume_window_s=0.1)
        assert 1 < len(gateway.asked) < 10


async def test_a_gateway_that_cannot_tell_is_not_the_last_to_be_asked() -> None:
    async def cannot_tell(_: ScriptedInference, request: object, context: object) -> None:
        async with reply_errors(context):  # type: ignore[arg-type]
            raise StoreUnavailable("whether another gateway has it cannot be told")

    async with scripted_gateway() as (gateway, address), Client(address) as client:
        gateway.generates = [breaks_after(*events("a", ends=False))]
        gateway.resumes = [cannot_tell, cannot_tell, says(*resumed(*events("a", "b", first=2)))]
        assert (await client.generate_text("x", resume_window_s=30.0)).text == "ab"


async def test_a_reader_that_leaves_ends_a_resumable_call() -> None:
    async with scripted_gateway() as (gateway, address), Client(address) as client:
        gateway.generates = [says(*events("a", "b", "c"))]
        async with aclosing(client.generate("x", resume_window_s=30.0, request_id="mine")) as pieces:
            async for piece in pieces:
                assert piece.text == "a"
                break
        assert gateway.aborted == ["mine"]


async def test_the_gateways_wish_for_a_wait_is_honoured() -> None:
    async def refuses(_: ScriptedInference, request: object, context: object) -> None:
        async with reply_errors(context):  # type: ignore[arg-type]
            raise RejectedError(RejectReason.RATE_LIMITED, "scripted", 0.3)

    waits: list[float] = []
    async with (
        scripted_gateway() as (gateway, address),
        Client(address, on_retry=lambda _, wait_s: waits.append(wait_s)) as client,
    ):
        gateway.generates = [refuses, says(*events("a"))]
        assert (await client.generate_text("x")).text == "a"
        assert len(waits) == 1
        assert waits[0] >= 0.3


def chat_events() -> list[pb.ChatResponse]:
    calls = (
        pb.ToolCallDelta(index=0, id="call-1", name="weather", arguments='{"city": '),
        pb.ToolCallDelta(index=0, arguments='"Ulm"}'),
        pb.ToolCallDelta(index=1, id="call-2", name="time", arguments="{}"),
    )
    found = [
        pb.ChatResponse(started=pb.Started(request_id="c", model="m")),
        pb.ChatResponse(delta=pb.ChatDelta(content="Let me ")),
        pb.ChatResponse(delta=pb.ChatDelta(content="see.", tool_calls=calls[:1])),
        pb.ChatResponse(delta=pb.ChatDelta(tool_calls=calls[1:])),
        pb.ChatResponse(finished=pb.Finished(reason=pb.FINISH_REASON_TOOL_CALLS)),
    ]
    for number, event in enumerate(found):
        event.event_index = number
    return found


async def test_messages_and_their_calls_are_put_together_over_a_break() -> None:
    told = chat_events()
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    async with scripted_gateway() as (gateway, address), Client(address) as client:
        gateway.chats = [breaks_after(*told[:3])]
        gateway.resumes = [says(*[pb.ResumeResponse(chat=event) for event in told[3:]])]
        asked = Message("user", "Weather in Ulm?", name="ada")
        reply = await client.chat_message(
            [
                asked,
                Message("assistant", "", tool_calls=(ToolCall("0", "time", "{}"),)),
                Message("tool", "9", "", (), "0"),
            ],
            tools=[Tool("weather", "of a city", schema, strict=True), Tool("time")],
            tool_choice=NamedTool("weather"),
            parallel_tool_calls=False,
            template_arguments={"enable_thinking": False},
            resume_window_s=5.0,
            constraint=json_schema(schema),
        )
        assert reply.message.content == "Let me see."
        assert reply.message.tool_calls == (
            ToolCall("call-1", "weather", '{"city": "Ulm"}'),
            ToolCall("call-2", "time", "{}"),
        )
        assert reply.summary.finish_reason is FinishReason.TOOL_CALLS
        request = gateway.asked[0]
        assert [(one.role, one.name, one.tool_call_id) for one in request.messages] == [
            ("user", "ada", ""),
            ("assistant", "", ""),
            ("tool", "", "0"),
        ]
        assert request.messages[1].tool_calls[0].name == "time"
        assert [(one.name, one.strict, one.parameters) for one in request.tools] == [
            ("weather", True, json.dumps(schema)),
            ("time", False, ""),
        ]
        assert request.tool_choice.name == "weather"
        assert request.HasField("parallel_tool_calls")
        assert not request.parallel_tool_calls
        assert json.loads(request.chat_template_arguments) == {"enable_thinking": False}
        assert json.loads(request.sampling.constraint.json_schema) == schema


async def test_the_deadline_is_over_all_attempts() -> None:
    async with scripted_gateway() as (gateway, address), Client(address, max_retries=100) as client:
        gateway.generates = [breaks_after()] * 100
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(WorkerLost):
                await client.generate_text("x", deadline_s=0.3)
        assert len(gateway.asked) < 10
