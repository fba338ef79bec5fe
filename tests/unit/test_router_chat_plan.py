"""What a chat call is held to: choices of tools, strictness, forms of the answer, bounds; against the real compiler."""

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import xgrammar

from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest
from core.request import Finish, FinishReason
from grammar.bounds import check
from grammar.config import GrammarLimits
from router.chat.assembler import ChatAssembler
from router.chat.events import ContentDelta, ToolCallDelta
from router.chat.messages import ChatCall, ChatMessage, Tool, ToolCall, ToolChoice, ToolChoiceMode
from router.chat.plan import ChatPlan, plan_chat
from router.chat.style import ChatStyle
from router.chat.tool_formats.known import FORMATS

END = 256
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "exact": {"type": "boolean"}},
    "required": ["unit"],
}
WEATHER, CLOCK = Tool("get_weather", "Weather", json.dumps(SCHEMA)), Tool("get-time", "Time")
STRICT = Tool("get_weather", "Weather", json.dumps(SCHEMA), strict=True)
USER = (ChatMessage("user", "?"),)
REQUIRED, AUTO, NONE = (ToolChoice(ToolChoiceMode(mode)) for mode in ("required", "auto", "none"))
NAMED = ToolChoice(ToolChoiceMode.NAMED, "get_weather")
MARKS = sorted({mark for one in FORMATS.values() for mark in one.marks})
SPECIAL: Mapping[str, int] = {mark: END + 1 + order for order, mark in enumerate(MARKS)}


def style(tool_format: str, special: Mapping[str, int] = SPECIAL) -> ChatStyle:
    return ChatStyle(True, True, FORMATS[tool_format], special)


class Model:
    """Writes at random what its constraint allows: a token for every byte, and one for every special mark."""

    def __init__(self) -> None:
        marks = [b"\xff" + mark.encode() for mark in MARKS]  # no UTF-8, so only a grammar that names them allows them
        texts = [*(bytes([byte]) for byte in range(256)), b"", *marks]
        self._info = xgrammar.TokenizerInfo(texts, xgrammar.VocabType.RAW, stop_token_ids=[END])
        # Its cache takes grammars that differ in the ids of named tokens only for one.
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)

    def follow(self, constraint: Constraint) -> xgrammar.GrammarMatcher:
        check(constraint, GrammarLimits())
        assert constraint.kind is ConstraintKind.STRUCTURAL_TAG
        return xgrammar.GrammarMatcher(self._compiler.compile_structural_tag(constraint.text))

    def write(self, plan: ChatPlan, seed: int) -> str:
        assert plan.constraint is not None
        matcher, rng = self.follow(plan.constraint), random.Random(seed)
        words = np.zeros((1, (self._info.vocab_size + 31) // 32), np.int32)
        text = b""
        for _ in range(4000):
            matcher.fill_next_token_bitmask(words)
            bits = np.unpackbits(words[0].view(np.uint8), bitorder="little")
            allowed = [int(one) for one in np.flatnonzero(bits[: self._info.vocab_size])]
            visible = [one for one in allowed if one == END or one > END or not bytes([one]).isspace()]
            token_id = rng.choice(visible or allowed)
            assert matcher.accept_token(token_id)
            if token_id == END:
                return text.decode()
            text += plan.spoken_tokens[token_id].encode() if token_id > END else bytes([token_id])
        raise AssertionError(f"no end of {text[:500]!r}")

    def allows(self, plan: ChatPlan, text: str, special: Mapping[str, int] = SPECIAL) -> bool:
        assert plan.constraint is not None
        matcher = self.follow(plan.constraint)
        for mark, token_id in special.items():
            text = text.replace(mark, chr(0x10FF00 + token_id - END))
        for character in text:
            spelled = ord(character) - 0x10FF00
            ids = [END + spelled] if spelled > 0 else list(character.encode())
            if not all(matcher.accept_token(one) for one in ids):
                return False
        return bool(matcher.accept_token(END))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def message(plan: ChatPlan, text: str) -> tuple[str, list[tuple[str, Any]], str]:
    made = ChatAssembler(plan, lambda: "x" * 24)
    content = ""
    calls: dict[int, tuple[str, str]] = {}
    for delta in made.push(text, True):
        if isinstance(delta, ContentDelta):
            content += delta.text
        else:
            name, arguments = calls.get(delta.index, (delta.name, ""))
            calls[delta.index] = (name, arguments + delta.arguments)
    read = [(name, json.loads(arguments)) for name, arguments in calls.values()]
    return content, read, made.finish_reason(Finish(FinishReason.STOP))


def is_right(values: Any) -> bool:
    return (
        values["unit"] in ("C", "F")
        and set(values) <= {"unit", "exact"}
        and isinstance(values.get("exact", True), bool)
    )


@pytest.mark.parametrize("has_special_marks", [True, False])
@pytest.mark.parametrize("tool_format", sorted(FORMATS))
def test_a_required_call_comes_and_is_right(model: Model, tool_format: str, has_special_marks: bool) -> None:
    """Whatever the model would write, what the grammar lets it write is read as calls of tools on offer."""
    manner = style(tool_format, SPECIAL if has_special_marks else {})
    plan = plan_chat(ChatCall(USER, (WEATHER, CLOCK), REQUIRED), manner)
    seen = []
    for seed in range(10):
        content, calls, reason = message(plan, model.write(plan, seed))
        assert (content, reason) == ("", "tool_calls")
        assert calls
        seen += calls
        assert all(is_right(values) if name == "get_weather" else values == {} for name, values in calls)
    assert {name for name, _ in seen} == {"get_weather", "get-time"}


@pytest.mark.parametrize("tool_format", sorted(FORMATS))
def test_a_named_call_is_the_only_one(model: Model, tool_format: str) -> None:
    plan = plan_chat(ChatCall(USER, (WEATHER, CLOCK), NAMED), style(tool_format))
    assert plan.prompt.tools == (WEATHER, CLOCK)
    for seed in range(3):
        _, calls, reason = message(plan, model.write(plan, seed))
        assert (len(calls), calls[0][0], reason) == (1, "get_weather", "tool_calls")
        assert is_right(calls[0][1])


def test_one_call_where_several_are_not_wanted(model: Model) -> None:
    call = '<tool_call>\n{"name": "get-time", "arguments": {}}\n</tool_call>'
    for is_parallel in (True, False):
        plan = plan_chat(ChatCall(USER, (CLOCK,), REQUIRED, parallel_tool_calls=is_parallel), style("hermes", {}))
        assert model.allows(plan, call, {})
        assert model.allows(plan, f"{call}\n{call}", {}) is is_parallel


GUIDED = [
    ("hermes", '<tool_call>\n{{"name": "get_weather", "arguments": {}}}\n</tool_call>'),
    ("granite", '<|tool_call|>[{{"name": "get_weather", "arguments": {}}}]'),
    ("mistral", '[TOOL_CALLS][{{"name": "get_weather", "arguments": {}}}]'),
    ("mistral_named", "[TOOL_CALLS]get_weather[ARGS]{}"),
    ("llama3_json", '{{"name": "get_weather", "parameters": {}}}'),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
]


@pytest.mark.parametrize("has_special_marks", [True, False])
@pytest.mark.parametrize(("tool_format", "call"), GUIDED, ids=[one[0] for one in GUIDED])
def test_a_strict_tool_is_called_rightly_or_not_at_all(
    model: Model, tool_format: str, call: str, has_special_marks: bool
) -> None:
    special = SPECIAL if has_special_marks else {}
    plan = plan_chat(ChatCall(USER, (STRICT, CLOCK)), style(tool_format, special))
    assert model.allows(plan, "No, 1 < 2 [really].", special)
    assert model.allows(plan, call.format('{"unit": "C"}'), special)
    assert not model.allows(plan, call.format('{"unit": "K"}'), special)
    assert not model.allows(plan, call.format("{}"), special)
    loose = call.replace("get_weather", "get-time").format('{"any": ["thing"]}')
    assert model.allows(plan, loose, special), "only the strict one is held to its schema"
    assert not model.allows(plan, call.replace("get_weather", "other").format("{}"), special)


@pytest.mark.parametrize(
    ("constraint", "answer", "other"),
    [
        (Constraint(ConstraintKind.JSON_OBJECT), '{"a": 1}', "a"),
        (Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA)), '{"unit": "F"}', '{"unit": "K"}'),
        (Constraint(ConstraintKind.REGEX, "[ab]+"), "aab", "c"),
        (Constraint(ConstraintKind.CHOICE, '["yes", "<tool_call>"]'), "yes", "no"),
        (Constraint(ConstraintKind.GRAMMAR, 'root ::= "x" root | "y"'), "xxy", "xx"),
    ],
    ids=lambda one: one.kind.value if isinstance(one, Constraint) else "",
)
def test_an_answer_has_its_form_where_the_model_may_call(
    model: Model, constraint: Constraint, answer: str, other: str
) -> None:
    plan = plan_chat(ChatCall(USER, (WEATHER,), constraint=constraint), style("hermes", {}))
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"unit": "C"}}\n</tool_call>'
    assert model.allows(plan, answer, {})
    assert model.allows(plan, call, {})
    assert not model.allows(plan, other, {})
    assert message(plan, call) == ("", [("get_weather", {"unit": "C"})], "tool_calls")
    assert message(plan, answer) == (answer, [], "stop")


def test_without_a_choice_nothing_is_in_the_way() -> None:
    plain = plan_chat(ChatCall(USER), style("hermes"))
    assert (plain.constraint, plain.tools, plain.prompt.tools) == (None, None, ())
    form = Constraint(ConstraintKind.JSON_OBJECT)
    unused = plan_chat(ChatCall(USER, (WEATHER,), NONE, constraint=form), style("hermes"))
    assert (unused.constraint, unused.tools, unused.prompt.tools) == (form, None, ()), (
        "what must not be called is hidden"
    )
    offered = plan_chat(ChatCall(USER, (WEATHER,), AUTO), style("hermes"))
    assert (offered.constraint, offered.prompt.tools) == (None, (WEATHER,))
    assert offered.spoken_tokens == {SPECIAL[mark]: mark for mark in ("<tool_call>", "</tool_call>")}


BARE = ChatStyle(True, True, None)
DEEP = '{"a":' * 100 + "1" + "}" * 100
REFUSED: list[tuple[str, ChatCall, ChatStyle, str, str]] = [
    ("no-messages", ChatCall(()), BARE, "messages", "empty"),
    ("no-role", ChatCall((*USER, ChatMessage(""))), BARE, "messages[1].role", "empty"),
    ("long-role", ChatCall((ChatMessage("x" * 65),)), BARE, "messages[0].role", "64"),
    ("many-messages", ChatCall(USER * 20_000), BARE, "messages", "20000"),
    (
        "nameless-call",
        ChatCall((ChatMessage("assistant", tool_calls=(ToolCall("1", "", ""),)),)),
        BARE,
        "messages[0].tool_calls[0].name",
        "empty",
    ),
    ("no-template", ChatCall(USER), ChatStyle(), "messages", "no chat template"),
    ("template-without-tools", ChatCall(USER, (WEATHER,)), ChatStyle(True), "tools", "knows no tools"),
    ("unknown-format", ChatCall(USER, (WEATHER,)), BARE, "tools", "not known"),
    ("many-tools", ChatCall(USER, (WEATHER,) * 10_000), BARE, "tools", "10000"),
    ("twice", ChatCall(USER, (WEATHER, WEATHER)), BARE, "tools[1].name", "another"),
    *(
        (f"name-{order}", ChatCall(USER, (Tool(name),)), BARE, "tools[0].name", "letters")
        for order, name in enumerate(["", "a b", "x" * 65, "<tool_call>", 'a"', "é", "a\n"])
    ),
    ("parameters", ChatCall(USER, (Tool("f", parameters="{"),)), BARE, "tools[0].parameters", "not JSON"),
    ("list", ChatCall(USER, (Tool("f", parameters="[]"),)), BARE, "tools[0].parameters", "object"),
    ("nan", ChatCall(USER, (Tool("f", parameters='{"a": NaN}'),)), BARE, "tools[0].parameters", "NaN"),
    ("deep", ChatCall(USER, (Tool("f", parameters=DEEP),)), BARE, "tools[0].parameters", "deep"),
    ("huge-schema", ChatCall(USER, (Tool("f", parameters=" " * 300_000),)), BARE, "tools[0].parameters", "300000"),
    (
        "huge-tools",
        ChatCall(USER, tuple(Tool(f"f{number}", "x" * 60_000) for number in range(20))),
        BARE,
        "tools",
        "1200000",
    ),
    ("surrogate", ChatCall(USER, (Tool("f", "\ud800"),)), BARE, "tools[0].description", "Unicode"),
    ("choice-without-tools", ChatCall(USER, (), REQUIRED), BARE, "tool_choice", "no tools"),
    (
        "unknown-choice",
        ChatCall(USER, (WEATHER,), ToolChoice(ToolChoiceMode.NAMED, "other")),
        BARE,
        "tool_choice",
        "no tool 'other'",
    ),
    ("nameless-choice", ChatCall(USER, (WEATHER,), ToolChoice(ToolChoiceMode.NAMED)), BARE, "tool_choice", "mode"),
    (
        "forced-and-formed",
        ChatCall(USER, (WEATHER,), REQUIRED, constraint=Constraint(ConstraintKind.JSON_OBJECT)),
        style("hermes"),
        "tool_choice",
        "forces a call",
    ),
    (
        "formed-in-a-format-without-grammar",
        ChatCall(USER, (WEATHER,), constraint=Constraint(ConstraintKind.JSON_OBJECT)),
        style("pythonic"),
        "tools",
        "may call",
    ),
    ("arguments", ChatCall(USER, template_arguments="1"), BARE, "chat_template_arguments", "object"),
    ("deep-arguments", ChatCall(USER, template_arguments=DEEP), BARE, "chat_template_arguments", "deep"),
    (
        "huge-arguments",
        ChatCall(USER, template_arguments=json.dumps({"a": "x" * 70_000})),
        BARE,
        "chat_template_arguments",
        "65536",
    ),
]


@pytest.mark.parametrize(
    ("call", "manner", "field", "problem"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED]
)
def test_what_cannot_be_is_refused_by_name(call: ChatCall, manner: ChatStyle, field: str, problem: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        plan_chat(call, manner)
    assert error.value.field == field
    assert problem in error.value.problem
    assert len(str(error.value)) < 300


def test_a_model_of_an_unknown_format_can_be_made_to_call(model: Model) -> None:
    plan = plan_chat(ChatCall(USER, (WEATHER,), REQUIRED), BARE)
    _, calls, _ = message(plan, model.write(plan, 0))
    assert calls[0][0] == "get_weather"


def test_deltas_of_forced_calls_have_ids() -> None:
    plan = plan_chat(ChatCall(USER, (CLOCK,), REQUIRED), style("mistral"))
    deltas = ChatAssembler(plan, lambda: "abcdefghijkl" * 2).push(
        '[TOOL_CALLS][{"name": "get-time", "arguments": {}}]', True
    )
    assert deltas == [ToolCallDelta(0, "abcdefghi", "get-time", "{}")]
