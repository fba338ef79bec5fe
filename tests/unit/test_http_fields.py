"""Fields of OpenAI's requests: every one of them is served, or harmless, or refused by name."""

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams

from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest, PromptTooLong
from core.request import SamplingParams
from core.service_class import ServiceClass
from router.chat.messages import ChatMessage, Tool, ToolCall, ToolChoice, ToolChoiceMode
from router.http.chat_request import UNSERVED_CHAT, ChatOrder, ChatRequest, read_chat
from router.http.completion_request import UNSERVED_COMPLETION, CompletionOrder, CompletionRequest, read_completion
from router.http.fields import rename
from router.http.sampling_fields import WITHOUT_EFFECT
from router.intake import TextPrompt, TokenPrompt

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}


def chat(**fields: Any) -> ChatOrder:
    return read_chat({"messages": HELLO, **fields}, lambda name: name == "reasoning_effort")


def completion(**fields: Any) -> CompletionOrder:
    return read_completion({"prompt": "hello", **fields}, max_choices=128)


@pytest.mark.parametrize("name", sorted(ChatParams.__annotations__))
def test_every_field_of_openais_chat_is_known(name: str) -> None:
    assert (name in ChatRequest.model_fields) + (name in UNSERVED_CHAT) + (name in WITHOUT_EFFECT) == 1


@pytest.mark.parametrize("name", sorted(TextParams.__annotations__))
def test_every_field_of_openais_completions_is_known(name: str) -> None:
    assert (name in CompletionRequest.model_fields) + (name in UNSERVED_COMPLETION) + (name in WITHOUT_EFFECT) == 1


def test_what_one_of_the_two_serves_the_other_does_not_drop() -> None:
    assert ChatRequest.model_fields.keys() <= CompletionRequest.model_fields.keys() | UNSERVED_COMPLETION.keys()
    assert CompletionRequest.model_fields.keys() <= ChatRequest.model_fields.keys() | UNSERVED_CHAT.keys()


@pytest.mark.parametrize("name", sorted(UNSERVED_CHAT))
def test_an_unserved_field_of_chat_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not supported by this server") as refused:
        chat(**{name: {"some": "thing"}})
    assert refused.value.field == name
    for harmless in (None, *UNSERVED_CHAT[name]):
        chat(**{name: harmless})


@pytest.mark.parametrize("name", sorted(UNSERVED_COMPLETION))
def test_an_unserved_field_of_completions_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not supported by this server") as refused:
        completion(**{name: {"some": "thing"}})
    assert refused.value.field == name
    for harmless in (None, *UNSERVED_COMPLETION[name]):
        completion(**{name: harmless})


def test_what_equals_a_harmless_value_in_python_only_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="length_penalty"):
        chat(length_penalty=True)
    with pytest.raises(InvalidRequest, match="use_beam_search"):
        chat(use_beam_search=0)
    chat(length_penalty=1.0)


def test_unknown_fields_are_ignored() -> None:
    assert chat(of_next_year={"deep": [1]}, user="me", metadata={"a": "b"}).sampling == chat().sampling


@pytest.mark.parametrize("value", ["1", True, [], {}, "NaN", float("inf"), float("nan")])
@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
)
def test_a_number_is_a_number(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**{name: value})
    assert refused.value.field == name


@pytest.mark.parametrize("value", ["1", True, 1.5, [], {}, 1e300])
@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "top_k", "n", "seed", "top_logprobs", "priority"])
def test_an_integer_is_an_integer(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**{name: value})
    assert refused.value.field == name


def test_an_integer_may_have_a_zero_behind_its_point() -> None:
    assert chat(max_tokens=5.0).sampling.max_tokens == 5


BAD_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": None}, "messages"),
    "text as messages": ({"messages": "hello"}, "messages"),
    "a message of another type": ({"messages": ["hello"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "a number as content": ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    "a part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    "a part of another type": ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
    "a function call of old": (
        {"messages": [{"role": "assistant", "function_call": {"name": "x", "arguments": ""}}]},
        "messages[0].function_call",
    ),
    "a call of a user": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": "",
                    "tool_calls": [{"id": "1", "function": {"name": "x", "arguments": "{}"}}],
                }
            ]
        },
        "messages[0].tool_calls",
    ),
    "a custom call": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}]},
        "messages[0].tool_calls[0].type",
    ),
    "a call without an id": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": ""}}]}]},
        "messages[0].tool_calls[0].id",
    ),
    "tools of another type": ({"tools": {}}, "tools"),
    "a custom tool": ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    "a tool without a function": ({"tools": [{"type": "function"}]}, "tools[0].function"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "parameters of another type": (
        {"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    "an unknown choice": ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    "a choice of a custom tool": ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    "a choice without a name": ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    "a number as a choice": ({"tool_choice": 5}, "tool_choice"),
    "two lengths": ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    "alternatives without logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "too many alternatives": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "a number as logprobs": ({"logprobs": 5}, "logprobs"),
    "too few alternatives": ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    "too many of the prompt": ({"prompt_logprobs": 21}, "prompt_logprobs"),
    "best of": ({"best_of": 3}, "best_of"),
    "best of more than n": ({"n": 2, "best_of": 3}, "best_of"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    "text as stream": ({"stream": "yes"}, "stream"),
    "a number as stop": ({"stop": 5}, "stop"),
    "numbers as stop": ({"stop": [5]}, "stop[0]"),
    "a bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "a bias of a negative token": ({"logit_bias": {"-1": 1}}, "logit_bias"),
    "a bias twice": ({"logit_bias": {"7": 1, "07": 2}}, "logit_bias"),
    "a bias in words": ({"logit_bias": {"7": "much"}}, "logit_bias.7"),
    "a long bias": ({"logit_bias": {str(token): 0 for token in range(1025)}}, "logit_bias"),
    "a large seed": ({"seed": 2**64}, "seed"),
    "a small seed": ({"seed": -(2**63) - 1}, "seed"),
    "a tier": ({"service_tier": "gold"}, "service_tier"),
    "a format without a type": ({"response_format": {}}, "response_format.type"),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "an empty schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    "a list as schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
        "response_format.json_schema.schema",
    ),
    "an infinite schema": ({"guided_json": {"maximum": 1e999}}, "guided_json"),
    "two constraints": ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    "no choice": ({"guided_choice": []}, "guided_choice"),
    "an empty regex": ({"guided_regex": ""}, "guided_regex"),
    "structured by nothing": ({"structured_outputs": {}}, "structured_outputs"),
    "structured twice": ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
    "structured in another way": (
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
        "structured_outputs.whitespace_pattern",
    ),
    "structured by a number": ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    "template variables in a list": ({"chat_template_kwargs": []}, "chat_template_kwargs"),
}


@pytest.mark.parametrize(("fields", "field"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_chat_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**fields)
    assert refused.value.field == field


def test_every_field_that_is_wrong_is_named() -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(temperature="hot", stop=5, messages=[{"role": 7}])
    assert [field for field, _ in refused.value.violations] == ["temperature", "stop", "messages[0].role"]
    many = ["temperature", "top_p", "min_p", "stop", "seed", "n", "stream", "logprobs", "echo"]
    with pytest.raises(InvalidRequest) as refused:
        completion(**{name: {} for name in many})
    assert len(refused.value.violations) == 8
    with pytest.raises(InvalidRequest) as refused:
        completion(stop=[5] * 1000)
    assert refused.value.violations == (("stop[0]", "must be a valid string"),)
    with pytest.raises(InvalidRequest, match=r"^stop: must have at most 65536 items$"):
        completion(stop=["x"] * 65_537)
    with pytest.raises(InvalidRequest, match=r"^prompt: must have at most 65536 prompts$"):
        completion(prompt=[[1]] * 65_537)


def test_names_of_other_surfaces_are_said_as_ours() -> None:
    error = InvalidRequest(
        "sampling.top_p", "a", others=(("sampling.logprobs", "b"), ("chat[3].role", "c"), ("x", "d"))
    )
    names = {"sampling": "", "sampling.logprobs": "top_logprobs", "chat": "messages"}
    renamed = rename(error, names)
    assert renamed.violations == (("top_p", "a"), ("top_logprobs", "b"), ("messages[3].role", "c"), ("x", "d"))
    assert isinstance(rename(PromptTooLong("sampling", "long"), names), PromptTooLong)
    assert rename(PromptTooLong("sampling", "long"), names).field == "body"
    unknown = InvalidRequest("samplings", "e")
    assert rename(unknown, names) is unknown


BAD_COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt"),
    "an empty list": ({"prompt": []}, "prompt"),
    "an empty list of ids": ({"prompt": [[]]}, "prompt"),
    "mixed": ({"prompt": ["x", 5]}, "prompt"),
    "mixed ids": ({"prompt": [5, "x"]}, "prompt"),
    "mixed lists": ({"prompt": [[5], 5]}, "prompt"),
    "fractions": ({"prompt": [5.5]}, "prompt"),
    "truths": ({"prompt": [True]}, "prompt"),
    "negative ids": ({"prompt": [[1, -1]]}, "prompt"),
    "an object": ({"prompt": {"text": "x"}}, "prompt"),
    "many": ({"prompt": ["x"] * 129}, "prompt"),
    "truth as logprobs": ({"logprobs": True}, "logprobs"),
    "many alternatives": ({"logprobs": 21}, "logprobs"),
    "a suffix": ({"suffix": "end"}, "suffix"),
}


@pytest.mark.parametrize(("fields", "field"), BAD_COMPLETIONS.values(), ids=BAD_COMPLETIONS)
def test_a_bad_completion_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        completion(**fields)
    assert refused.value.field == field


def test_every_parameter_arrives() -> None:
    order = chat(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, logit_bias={"3": -100, "4": 2.5}, stop=["a", "b"], stop_token_ids=[9],
        ignore_eos=True, min_tokens=2, max_completion_tokens=30, seed=-1, logprobs=True, top_logprobs=4,
        prompt_logprobs=2, n=3, best_of=3,
    )  # fmt: skip
    assert order.sampling == SamplingParams(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, logit_bias={3: -100, 4: 2.5}, stop=("a", "b"), stop_token_ids=(9,),
        ignore_eos=True, min_tokens=2, max_tokens=30, seed=2**64 - 1, logprobs=4, prompt_logprobs=2,
    )  # fmt: skip
    assert order.fields.num_choices == 3
    assert (order.has_max_tokens, order.fields.max_tokens_field) == (True, "max_completion_tokens")


def test_nothing_said_is_openais_default() -> None:
    nulls = dict.fromkeys(ChatRequest.model_fields, None) | {"messages": HELLO}
    for order in (chat(), chat(**nulls)):
        assert order.sampling == SamplingParams()
        assert not order.has_max_tokens
    assert chat(top_k=-1).sampling == SamplingParams()
    assert completion().sampling == SamplingParams(max_tokens=16)
    assert completion(max_tokens=None).sampling == SamplingParams(max_tokens=16)
    assert completion(min_tokens=20).sampling == SamplingParams(min_tokens=20, max_tokens=20)


def test_markers_are_put_around_a_text_unless_it_has_them() -> None:
    assert completion(add_special_tokens=True).prompts == (TextPrompt("hello"),)
    assert completion(add_special_tokens=False).prompts == (TextPrompt("hello", with_markers=False),)
    assert completion(prompt=[5], add_special_tokens=False).prompts == (TokenPrompt((5,)),)


def test_both_names_of_the_length_hold_in_completions() -> None:
    assert completion(max_completion_tokens=3).sampling.max_tokens == 3
    assert completion(max_tokens=3, max_completion_tokens=3).sampling.max_tokens == 3
    with pytest.raises(InvalidRequest, match="contradicts"):
        completion(max_tokens=3, max_completion_tokens=4)


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        ("x", (TextPrompt("x"),)),
        (["x", "y"], (TextPrompt("x"), TextPrompt("y"))),
        ([1, 2], (TokenPrompt((1, 2)),)),
        ([[1, 2], [3]], (TokenPrompt((1, 2)), TokenPrompt((3,)))),
    ],
)
def test_prompts_come_in_four_forms(prompt: object, meant: object) -> None:
    assert completion(prompt=prompt).prompts == meant


def test_an_echoed_prompt_is_scored_as_the_answer() -> None:
    assert completion(echo=True).sampling.prompt_logprobs is None
    assert completion(echo=True, logprobs=3).sampling.prompt_logprobs == 3
    assert completion(echo=True, logprobs=3, prompt_logprobs=5).sampling.prompt_logprobs == 5
    assert completion(logprobs=3).sampling.prompt_logprobs is None


def test_no_tokens_are_one_that_is_not_told() -> None:
    order = completion(max_tokens=0, echo=True)
    assert order.is_prompt_only
    assert order.sampling.max_tokens == 1
    assert not completion(max_tokens=1).is_prompt_only


def test_messages_in_openais_words() -> None:
    order = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "seen"},
            {"role": "assistant", "refusal": "no"},
        ],
        tools=[TOOL, {"type": "function", "function": {"name": "wait", "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "wait"}},
        parallel_tool_calls=False,
        chat_template_kwargs={"enable_thinking": False},
    )
    assert order.call.messages == (
        ChatMessage("system", "be brief"),
        ChatMessage("user", "a\nb", name="Ann"),
        ChatMessage("assistant", None, tool_calls=(ToolCall("1", "look", '{"a": 1}'),)),
        ChatMessage("tool", "seen", tool_call_id="1"),
        ChatMessage("assistant", "no"),
    )
    schema = '{"type":"object","properties":{"b":{"type":"string"},"a":{"type":"integer"}}}'  # in the client's order
    assert order.call.tools == (Tool("look", "Looks.", schema), Tool("wait", strict=True))
    assert order.call.tool_choice == ToolChoice(ToolChoiceMode.NAMED, "wait")
    assert not order.call.parallel_tool_calls
    assert order.call.template_arguments == '{"enable_thinking":false}'


def test_an_effort_that_the_template_reads_is_handed_on() -> None:
    assert chat(reasoning_effort="low").call.template_arguments == '{"reasoning_effort":"low"}'
    both = chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"})
    assert both.call.template_arguments == '{"reasoning_effort":"high"}'
    body = {"messages": HELLO, "reasoning_effort": "low"}
    with pytest.raises(InvalidRequest, match="reasoning_effort: is not supported"):
        read_chat(body, lambda _: False)
    read_chat(body | {"reasoning_effort": "none"}, lambda _: False)


CONSTRAINTS: dict[str, tuple[dict[str, Any], Constraint | None]] = {
    "text": ({"response_format": {"type": "text"}}, None),
    "object": ({"response_format": {"type": "json_object"}}, Constraint(ConstraintKind.JSON_OBJECT)),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}},
        Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"null"}'),
    ),
    "guided schema": ({"guided_json": {"type": "null"}}, Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"null"}')),
    "guided schema as text": ({"guided_json": '{"a": 1}'}, Constraint(ConstraintKind.JSON_SCHEMA, '{"a": 1}')),
    "regex": ({"guided_regex": "[ab]+"}, Constraint(ConstraintKind.REGEX, "[ab]+")),
    "choice": ({"guided_choice": ["yes", "\u00e9"]}, Constraint(ConstraintKind.CHOICE, '["yes","\u00e9"]')),
    "grammar": ({"guided_grammar": 'root ::= "a"'}, Constraint(ConstraintKind.GRAMMAR, 'root ::= "a"')),
    "structured schema": ({"structured_outputs": {"json": {}}}, Constraint(ConstraintKind.JSON_SCHEMA, "{}")),
    "structured regex": ({"structured_outputs": {"regex": "a"}}, Constraint(ConstraintKind.REGEX, "a")),
    "structured choice": ({"structured_outputs": {"choice": ["a"]}}, Constraint(ConstraintKind.CHOICE, '["a"]')),
    "structured grammar": ({"structured_outputs": {"grammar": "g"}}, Constraint(ConstraintKind.GRAMMAR, "g")),
    "structured object": ({"structured_outputs": {"json_object": True}}, Constraint(ConstraintKind.JSON_OBJECT)),
    "SGLang's regex": ({"regex": "a"}, Constraint(ConstraintKind.REGEX, "a")),
    "SGLang's grammar": ({"ebnf": "g"}, Constraint(ConstraintKind.GRAMMAR, "g")),
    "SGLang's schema": ({"json_schema": "{}"}, Constraint(ConstraintKind.JSON_SCHEMA, "{}")),
}


@pytest.mark.parametrize(("fields", "meant"), CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_constraints_in_all_dialects(fields: dict[str, Any], meant: Constraint | None) -> None:
    assert chat(**fields).call.constraint == meant
    assert completion(**fields).sampling.constraint == meant


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({}, (None, None)),
        ({"service_tier": "auto"}, (None, None)),
        ({"service_tier": "flex"}, (ServiceClass.BATCH, None)),
        ({"service_tier": "priority"}, (ServiceClass.INTERACTIVE, 5)),
        ({"priority": -3}, (None, 3)),
        ({"priority": 0, "service_tier": "priority"}, (ServiceClass.INTERACTIVE, 0)),
    ],
)
def test_tiers_and_priorities(fields: dict[str, Any], meant: object) -> None:
    assert chat(**fields).fields.service() == meant
