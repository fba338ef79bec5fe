"""Tool calls read out of text: every format, however the text was cut."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.request import Finish, FinishReason
from router.chat.assembler import ChatAssembler
from router.chat.events import ChatDelta, ContentDelta, ToolCallDelta
from router.chat.messages import ChatCall, ChatMessage, Tool
from router.chat.plan import plan_chat
from router.chat.style import ChatStyle
from router.chat.tool_formats.known import FORMATS

WEATHER = Tool(
    "get_weather",
    "The weather of a place",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": ["boolean", "null"]},
                "near": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        }
    ),
)
CLOCK = Tool("get-time")
PARIS, ROME = {"city": "Paris"}, {"city": "Röme 🏛️", "days": 3, "near": ["a}", 'b"]']}


@dataclass(frozen=True)
class Message:
    content: str
    calls: tuple[tuple[str, str], ...] = ()
    reason: str = "stop"


def assembler(tool_format: str, *, is_parallel: bool = True, is_forced: bool = False) -> ChatAssembler:
    call = ChatCall((ChatMessage("user", "?"),), (WEATHER, CLOCK), parallel_tool_calls=is_parallel)
    plan = plan_chat(call, ChatStyle(True, True, FORMATS[tool_format]))
    assert plan.tools is not None
    plan = replace(plan, tools=replace(plan.tools, is_forced=is_forced))
    ids = iter(range(100))
    return ChatAssembler(plan, lambda: str(next(ids)).ljust(24, "x"))


def read(made: ChatAssembler, pieces: Sequence[str], finish: FinishReason = FinishReason.STOP) -> Message:
    """Put the deltas together as a client does, and check that they are well formed."""
    deltas: list[ChatDelta] = []
    for number, piece in enumerate(pieces):
        deltas += made.push(piece, number == len(pieces) - 1)
    content = ""
    calls: list[tuple[str, str]] = []
    ids: list[str] = []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            assert delta.text
            content += delta.text
        elif delta.index == len(calls):
            assert delta.id
            assert delta.name
            ids.append(delta.id)
            calls.append((delta.name, delta.arguments))
        else:
            assert delta.index == len(calls) - 1, "calls come one after the other"
            assert not delta.id
            assert not delta.name
            assert delta.arguments
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    assert len(set(ids)) == len(ids)
    return Message(content, tuple(calls), made.finish_reason(Finish(finish)))


def called(*calls: tuple[str, object], content: str = "") -> Message:
    return Message(content, tuple((name, dump(values)) for name, values in calls), "tool_calls")


def dump(values: object) -> str:
    return json.dumps(values, ensure_ascii=False)


def obj(name: str, values: object, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {dump(values)}}}'


BOTH = called(("get_weather", PARIS), ("get_weather", ROME))
DS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
CASES: list[tuple[str, str, str, Message]] = [
    # hermes
    ("hermes", "one", f"<tool_call>\n{obj('get_weather', PARIS)}\n</tool_call>", called(("get_weather", PARIS))),
    (
        "hermes",
        "two-with-text",
        (
            f"Let me see.\n\n<tool_call>\n{obj('get_weather', PARIS)}\n</tool_call>\n"
            f"<tool_call>\n{obj('get_weather', ROME)}\n</tool_call>\n"
        ),
        called(("get_weather", PARIS), ("get_weather", ROME), content="Let me see."),
    ),
    (
        "hermes",
        "text-after",
        f"<tool_call>{obj('get_weather', PARIS)}</tool_call> That is all. ",
        called(("get_weather", PARIS), content=" That is all."),
    ),
    (
        "hermes",
        "arguments-first",
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>',
        called(("get_weather", PARIS)),
    ),
    (
        "hermes",
        "arguments-as-text",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        called(("get_weather", PARIS)),
    ),
    ("hermes", "no-arguments", '<tool_call>{"name": "get-time"}</tool_call>', called(("get-time", {}))),
    (
        "hermes",
        "null-arguments",
        '<tool_call>{"name": "get-time", "arguments": null}</tool_call>',
        called(("get-time", {})),
    ),
    (
        "hermes",
        "unknown-name",
        f"<tool_call>{obj('other', {})}</tool_call>",
        called(("other", {})),
    ),
    (
        "hermes",
        "list",
        f"<tool_call>[{obj('get_weather', PARIS)}, {obj('get_weather', ROME)}]</tool_call>",
        BOTH,
    ),
    (
        "hermes",
        "two-in-one",
        f"<tool_call>\n{obj('get_weather', PARIS)}\n{obj('get_weather', ROME)}\n</tool_call>",
        BOTH,
    ),
    (
        "hermes",
        "end-mark-missing",
        f"<tool_call>\n{obj('get_weather', PARIS)}\n<tool_call>\n{obj('get_weather', ROME)}",
        BOTH,
    ),
    (
        "hermes",
        "end-mark-in-text",
        f"<tool_call>{obj('get_weather', {'city': '</tool_call>'})}</tool_call>",
        called(("get_weather", {"city": "</tool_call>"})),
    ),
    (
        "hermes",
        "brace-missing",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>',
        called(("get_weather", PARIS)),
    ),
    (
        "hermes",
        "not-json",
        "<tool_call>get_weather(Paris)</tool_call>",
        Message("<tool_call>get_weather(Paris)</tool_call>"),
    ),
    ("hermes", "other-json", '<tool_call>{"city": 1}</tool_call>', Message('<tool_call>{"city": 1}</tool_call>')),
    ("hermes", "no-name", '<tool_call>{"name": 5}</tool_call>', Message('<tool_call>{"name": 5}</tool_call>')),
    ("hermes", "empty", "", Message("")),
    ("hermes", "text", "a <tool_cal and 1 < 2 \n\n", Message("a <tool_cal and 1 < 2 \n\n")),
    ("hermes", "cut-in-mark", "a <tool_c", Message("a <tool_c")),
    ("hermes", "cut-before-name", 'a <tool_call>\n{"name": "get_w', Message('a <tool_call>\n{"name": "get_w')),
    ("hermes", "cut-after-name", '<tool_call>\n{"name": "get_weather"', Message("", (("get_weather", ""),))),
    (
        "hermes",
        "cut-in-arguments",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa\\',
        Message("", (("get_weather", '{"city": "Pa\\'),)),
    ),
    # other JSON between marks
    ("granite", "list", f"<|tool_call|>[{obj('get_weather', PARIS)}, {obj('get_weather', ROME)}]", BOTH),
    (
        "phi4_mini",
        "list",
        f"<|tool_call|>[{obj('get_weather', PARIS)},{obj('get_weather', ROME)}]<|/tool_call|>",
        BOTH,
    ),
    # bare JSON
    ("llama3_json", "one", obj("get_weather", PARIS, "parameters"), called(("get_weather", PARIS))),
    (
        "llama3_json",
        "marked",
        f"<|python_tag|>{obj('get_weather', PARIS, 'parameters')}; {obj('get_weather', ROME, 'parameters')}",
        BOTH,
    ),
    (
        "llama3_json",
        "typed",
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        called(("get_weather", PARIS)),
    ),
    ("llama3_json", "unknown", obj("other", {}, "parameters"), Message(obj("other", {}, "parameters"))),
    ("llama3_json", "answer", ' {"city": "Paris"} is JSON', Message(' {"city": "Paris"} is JSON')),
    ("llama3_json", "later", f"So: {obj('get_weather', PARIS)}", Message(f"So: {obj('get_weather', PARIS)}")),
    (
        "llama3_json",
        "text-after",
        f"{obj('get_weather', PARIS)} and text",
        called(("get_weather", PARIS), content=" and text"),
    ),
    ("json", "list", f"[{obj('get_weather', PARIS)}, {obj('get_weather', ROME)}]", BOTH),
    ("json", "other-list", "[1, 2]", Message("[1, 2]")),
    # Mistral
    ("mistral", "list", f"[TOOL_CALLS] [{obj('get_weather', PARIS)}, {obj('get_weather', ROME)}]", BOTH),
    (
        "mistral",
        "named",
        f"Well.[TOOL_CALLS]get_weather[ARGS]{dump(PARIS)}[TOOL_CALLS]get_weather[CALL_ID]x1y[ARGS]{dump(ROME)}",
        called(("get_weather", PARIS), ("get_weather", ROME), content="Well."),
    ),
    ("mistral_named", "short", "[TOOL_CALLS]get-time{}", called(("get-time", {}))),
    ("mistral_named", "no-call", "[TOOL_CALLS]get-time now", Message("[TOOL_CALLS]get-time now")),
    # a header, then JSON
    (
        "deepseek_v3",
        "two",
        (
            f"Ok.{DS[0]}{DS[2]}function{DS[4]}get_weather\n```json\n{dump(PARIS)}\n```{DS[3]}\n"
            f"{DS[2]}function{DS[4]}get_weather\n```json\n{dump(ROME)}\n```{DS[3]}{DS[1]}"
        ),
        called(("get_weather", PARIS), ("get_weather", ROME), content="Ok."),
    ),
    (
        "deepseek_v31",
        "two",
        f"{DS[0]}{DS[2]}get_weather{DS[4]}{dump(PARIS)}{DS[3]}{DS[2]}get_weather{DS[4]}{dump(ROME)}{DS[3]}{DS[1]}",
        BOTH,
    ),
    ("deepseek_v31", "broken", f"{DS[0]} nothing", Message(f"{DS[0]} nothing")),
    (
        "kimi_k2",
        "two",
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
            f"{dump(PARIS)}<|tool_call_end|><|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>"
            f"{dump(ROME)}<|tool_call_end|><|tool_calls_section_end|>"
        ),
        BOTH,
    ),
    # arguments one by one
    (
        "qwen3_coder",
        "two",
        (
            "Now.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nRöme 🏛️\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n"
            '<parameter=near>\n["a}", "b\\"]"]\n</parameter>\n</function>\n</tool_call>'
        ),
        called(("get_weather", PARIS), ("get_weather", ROME), content="Now."),
    ),
    (
        "qwen3_coder",
        "lines",
        (
            '<function=get_weather>\n<parameter=city>\n\nif x < 1:\n  "a"\n\n</parameter>\n'
            "<parameter=exact>\nTrue\n</parameter></function>"
        ),
        called(("get_weather", {"city": '\nif x < 1:\n  "a"\n', "exact": True})),
    ),
    ("qwen3_coder", "none", "<tool_call>\n<function=get-time>\n</function>\n</tool_call>", called(("get-time", {}))),
    ("qwen3_coder", "text", "a <function b", Message("a <function b")),
    (
        "qwen3_coder",
        "cut",
        "<tool_call><function=get_weather>\n<parameter=city>\nPar",
        Message("", (("get_weather", '{"city": "Par'),)),
    ),
    (
        "glm45",
        "two",
        (
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n"
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Röme 🏛️</arg_value>\n<arg_key>days</arg_key>\n"
            '<arg_value>3</arg_value>\n<arg_key>near</arg_key>\n<arg_value>["a}", "b\\"]"]</arg_value>\n</tool_call>'
        ),
        BOTH,
    ),
    ("glm45", "none", "<tool_call>get-time\n</tool_call>", called(("get-time", {}))),
    ("glm45", "text", "<tool_call>get-time and", Message("<tool_call>get-time and")),
    # Python
    (
        "pythonic",
        "two",
        "[get_weather(city='Paris'), get_weather(city=\"Röme 🏛️\", days=3, near=['a}', 'b\"]'])]",
        BOTH,
    ),
    (
        "pythonic",
        "odd",
        "[get_weather('a\\'b', 3, exact=None, near=(1, {'x': [True]}))]",
        called(("get_weather", {"city": "a'b", "days": 3, "exact": None, "near": [1, {"x": [True]}]})),
    ),
    ("pythonic", "no-literal", "[get_weather(city=Paris)]", called(("get_weather", {"city": "Paris"}))),
    ("pythonic", "unknown", "[other(1)]", Message("[other(1)]")),
    ("pythonic", "answer", "[1, 2] is a list", Message("[1, 2] is a list")),
    ("pythonic", "cut", "[get_weather(city='Par", Message("", (("get_weather", ""),))),
    (
        "llama4_pythonic",
        "marked",
        "Yes. <|python_start|>[get_weather(city='Paris')]<|python_end|>",
        called(("get_weather", PARIS), content="Yes."),
    ),
]
IDS = [f"{name}-{case}" for name, case, _, _ in CASES]


@pytest.mark.parametrize(("tool_format", "text", "message"), [(one[0], one[2], one[3]) for one in CASES], ids=IDS)
def test_calls_and_content(tool_format: str, text: str, message: Message) -> None:
    assert read(assembler(tool_format), [text]) == message
    assert read(assembler(tool_format), [*text, ""]) == message, "character by character"


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_cut_gives_the_same(data: st.DataObject) -> None:
    """Any text, whole or cut off anywhere, in any pieces: what comes of it is what comes of it in one piece."""
    tool_format, _, text, _ = data.draw(st.sampled_from(CASES))
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + data.draw(st.sampled_from(['"', "}", "\\", "<", "\n", ",", "]", "x", "<tool_call>"]))
            + text[place:]
        )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(assembler(tool_format), [text])
    assert read(assembler(tool_format), pieces) == whole
    assert read(assembler(tool_format), [*text, ""]) == whole


@settings(deadline=None)
@given(tool_format=st.sampled_from(sorted(FORMATS)), text=st.text(max_size=200))
@example(tool_format="hermes", text=" \n ")
def test_text_without_calls_is_content_to_the_letter(tool_format: str, text: str) -> None:
    assert read(assembler(tool_format), [text]) == Message(text)


STREAMED = [
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "', "Paris and", ' more"}}</tool_call>'),
    ("mistral_named", '[TOOL_CALLS]get_weather[ARGS]{"city": "', "Paris and", ' more"}'),
    ("deepseek_v31", f'{DS[0]}{DS[2]}get_weather{DS[4]}{{"city": "', "Paris and", f' more"}}{DS[3]}{DS[1]}'),
    ("qwen3_coder", "<function=get_weather><parameter=city>", "Paris and", " more</parameter></function>"),
]


@pytest.mark.parametrize(("tool_format", "begin", "middle", "end"), STREAMED, ids=[one[0] for one in STREAMED])
def test_arguments_are_told_as_they_come(tool_format: str, begin: str, middle: str, end: str) -> None:
    made = assembler(tool_format)
    first, second, third = (made.push(piece, piece == end) for piece in (begin, middle, end))
    assert [(one.name, one.arguments) for one in first if isinstance(one, ToolCallDelta)] == [
        ("get_weather", '{"city": "')
    ]
    assert second == [ToolCallDelta(0, "", "", "Paris and")]
    assert third == [ToolCallDelta(0, "", "", ' more"}')]


def test_content_is_told_as_it_comes() -> None:
    made = assembler("hermes")
    assert made.push("Let me <") == [ContentDelta("Let me")]
    assert made.push("b> \n") == [ContentDelta(" <b>")]
    assert made.push("see <tool_c") == [ContentDelta(" \nsee")]
    assert made.push("", True) == [ContentDelta(" <tool_c")]


def test_one_call_where_no_more_are_wanted() -> None:
    text = next(one[2] for one in CASES if one[:2] == ("hermes", "two-with-text"))
    expected = called(("get_weather", PARIS), content="Let me see.")
    assert read(assembler("hermes", is_parallel=False), [text]) == expected
    assert read(assembler("hermes", is_parallel=False), [*text, ""]) == expected


@pytest.mark.parametrize(("tool_format", "text", "message"), [(one[0], one[2], one[3]) for one in CASES], ids=IDS)
def test_wherever_calls_are_cut_off_nothing_of_them_is_content(tool_format: str, text: str, message: Message) -> None:
    """Once a call was told; before, nobody knows that it is one, unless calls were forced."""
    for end in range(len(text)):
        seen = read(assembler(tool_format), [text[:end]], FinishReason.LENGTH)
        if seen.calls:
            assert message.content.startswith(seen.content)
        else:
            assert seen.content == text[:end]
        forced = read(assembler(tool_format, is_forced=True), [text[:end]], FinishReason.LENGTH)
        assert (forced.content, forced.calls) == ("", seen.calls)


def test_ids_are_as_the_model_knows_them() -> None:
    ids = {
        name: next(delta.id for delta in assembler(name).push(text, True) if isinstance(delta, ToolCallDelta))
        for name, case, text, message in CASES
        if message.calls
    }
    assert ids["hermes"] == "call_0" + "x" * 23
    assert (ids["mistral"], ids["kimi_k2"]) == ("0" + "x" * 8, "functions.get_weather:0")
    twice = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>" * 2
    deltas = assembler("kimi_k2").push(twice, True)
    assert [one.id for one in deltas if isinstance(one, ToolCallDelta)] == ["functions.f:0", "functions.f:1"]


def test_a_generation_that_was_cut_ended_by_its_length() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city'
    assert read(assembler("hermes"), [text], FinishReason.LENGTH).reason == "length"
    assert read(assembler("hermes"), [text], FinishReason.STOP).reason == "stop", "there is no whole call to be made"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 20_000,
        '<tool_call>{"name": "' + "x" * 200_000,
        '<tool_call>{"arguments": {"a": "' + "x" * 200_000,
        "<tool_call>" + "[" * 200_000,
        '<tool_call>{"name": "f", "arguments": ' + "[" * 200_000,
        "<tool_call>" + " " * 200_000,
    ],
    ids=["marks", "name", "arguments-first", "lists", "deep-arguments", "spaces"],
)
def test_what_models_babble_is_read_in_time_that_grows_with_it(text: str) -> None:
    """Piece by piece, as tokens come: what was held back once is not looked at again and again."""
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    message = read(assembler("hermes"), [*pieces, ""])
    assert len(message.content) + sum(len(arguments) for _, arguments in message.calls) >= len(text) - 40
