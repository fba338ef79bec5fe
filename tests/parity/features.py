"""The rows: what a client may ask for. Every row says which of its options are the feature, so that a test can tell
that they do something: without them the answer is another one.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.constraint import Constraint, ConstraintKind
from tandem_client import Message, NamedTool, Tool
from tandem_client.types import ToolChoice
from tests.parity.answers import Answer
from tests.parity.texts import corpus, text_of

EOS = 2
COMMON: Mapping[str, Any] = {"temperature": 0.9, "max_tokens": 20, "logprobs": 2}
GREEDY: Mapping[str, Any] = {**COMMON, "temperature": 0.0}

WEATHER = Tool(
    "get_weather",
    "The weather of a place.",
    {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 12}, "days": {"enum": [1, 2, 3]}},
        "required": ["place", "days"],
        "additionalProperties": False,
    },
)
CLOCK = Tool("get_time", "The time.", {"type": "object", "properties": {}, "additionalProperties": False})
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<call>",
        "content": {"type": "json_schema", "json_schema": SCHEMA},
        "end": "</call>",
    },
}
PICTURES = ["\U0001f600 a caf\u00e9 \U0001f680 and more", "\U0001f4a1\U0001f4a1 na\u00efve \u4f60\u597d end"]


@dataclass(frozen=True, slots=True)
class Chat:
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice | None = None
    is_parallel: bool | None = None


@dataclass(frozen=True, slots=True)
class Feature:
    """One row.

    Attributes:
        options: sampling options, by the names that client and engine share.
        added: what to add to them by what the answer without it looks like.
        n: answers.
        length: of the prompt.
        is_text: the prompt is sent as text.
        chat: in place of the prompt.
        without: the options that the feature consists of.
    """

    name: str
    options: Mapping[str, Any]
    without: tuple[str, ...] = ()
    added: Callable[[Answer], Mapping[str, Any]] | None = None
    n: int = 1
    length: int = 52
    is_text: bool = False
    chat: Chat | None = field(default=None)

    @property
    def decodes(self) -> bool:
        """More than one token is asked for, so there is something to hand over."""
        return bool(self.options["max_tokens"] > 1)

    @property
    def scores_prompt(self) -> bool:
        return "prompt_logprobs" in self.options


def across_tokens(first: int) -> Callable[[Answer], Mapping[str, Any]]:
    """A stop string that begins in the middle of one token and ends in the next."""

    def added(plain: Answer) -> Mapping[str, Any]:
        ids = plain.choices[0].token_ids
        for at in range(first, len(ids) - 1):
            before, text = text_of(ids[:at]), text_of(ids[: at + 2])
            middle = len(text_of(ids[: at + 1]))
            stop = text[middle - 1 : middle + 1]
            if len(stop) == 2 and stop not in before and text.index(stop) == middle - 1:
                return {"stop": ("never to be seen", stop)}
            if first == 0:
                break
        raise AssertionError(f"no stop string from token {first} on in {text_of(ids)!r}")

    return added


def nth_token(at: int) -> Callable[[Answer], Mapping[str, Any]]:
    def added(plain: Answer) -> Mapping[str, Any]:
        return {"stop_token_ids": (plain.choices[0].token_ids[at],)}

    return added


def _constrained(kind: ConstraintKind, value: object, **options: Any) -> Mapping[str, Any]:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {**COMMON, "max_tokens": 80, "constraint": Constraint(kind, text), **options}


def _asked(content: str, *tools: Tool, choice: ToolChoice | None = None, is_parallel: bool | None = None) -> Chat:
    """A system message of its own: no two rows' prompts begin alike."""
    messages = Message("system", f"{content} That will be asked."), Message("user", content)
    return Chat(messages, tools, choice, is_parallel)


_KIND = ConstraintKind
_ALL_AT_ONCE: Mapping[str, Any] = {
    "temperature": 0.8, "top_k": 60, "top_p": 0.97, "min_p": 0.002, "presence_penalty": 0.4, "frequency_penalty": 0.3,
    "repetition_penalty": 1.15, "logit_bias": {EOS: 3.0, 40: 1.5}, "stop": ("\n\n\n",), "stop_token_ids": (3,),
    "min_tokens": 9, "max_tokens": 40, "logprobs": 5, "prompt_logprobs": 2,
}  # fmt: skip

FEATURES: tuple[Feature, ...] = (
    Feature("greedy", {"temperature": 0.0, "max_tokens": 20}),
    Feature("temperature and seed", COMMON, without=("temperature",)),
    Feature("temperature 0.3", {**COMMON, "temperature": 0.3}),
    Feature("top_k", {**COMMON, "temperature": 1.5, "top_k": 4}, without=("top_k",)),
    Feature("top_p", {**COMMON, "temperature": 1.5, "top_p": 0.6}, without=("top_p",)),
    Feature("min_p", {**COMMON, "temperature": 1.5, "min_p": 0.2}, without=("min_p",)),
    Feature("presence_penalty", {**GREEDY, "presence_penalty": 2.0}, without=("presence_penalty",)),
    Feature("frequency_penalty", {**GREEDY, "frequency_penalty": 2.0}, without=("frequency_penalty",)),
    Feature("repetition_penalty over the prompt", {**GREEDY, "repetition_penalty": 1.8}, ("repetition_penalty",)),
    Feature("logit_bias", {**COMMON, "logit_bias": {311: 6.0, 50: 4.0, 46: -100.0}}, without=("logit_bias",)),
    Feature("stop string across a token border", COMMON, without=("stop",), added=across_tokens(7)),
    Feature("stop string across the hand-over", COMMON, without=("stop",), added=across_tokens(0)),
    Feature(
        "stop string across UTF-8 borders",
        _constrained(_KIND.CHOICE, PICTURES, stop=("\u00ef\u4f60", "\U0001f680 a", "e \u4f60")),
        without=("stop",),
    ),
    Feature(
        "stop string of one character, its bytes on both workers",
        _constrained(_KIND.CHOICE, PICTURES, stop=("\U0001f600", "\U0001f4a1\U0001f4a1")),
        without=("stop",),
    ),
    Feature("text of characters cut by max_tokens", _constrained(_KIND.CHOICE, PICTURES, max_tokens=3)),
    Feature("stop_token_ids", COMMON, without=("stop_token_ids",), added=nth_token(8)),
    Feature("stop_token_ids, the first token", COMMON, without=("stop_token_ids",), added=nth_token(0)),
    Feature("end of sequence", {**COMMON, "logit_bias": {EOS: 9.0}}, without=("logit_bias",)),
    Feature("ignore_eos", {**COMMON, "logit_bias": {EOS: 9.0}, "ignore_eos": True}, without=("ignore_eos",)),
    Feature("min_tokens", {**COMMON, "logit_bias": {EOS: 100.0}, "min_tokens": 11}, without=("min_tokens",)),
    Feature("max_tokens = 1", {**COMMON, "max_tokens": 1}, without=("max_tokens",)),
    Feature("max_tokens = 2", {**COMMON, "max_tokens": 2}, without=("max_tokens",)),
    Feature("logprobs without alternatives", {**COMMON, "logprobs": 0}, without=("logprobs",)),
    Feature("logprobs, 20 alternatives", {**COMMON, "logprobs": 20}, without=("logprobs",)),
    Feature("prompt_logprobs", {**COMMON, "prompt_logprobs": 0}, without=("prompt_logprobs",)),
    Feature(
        "prompt_logprobs, 20 alternatives, in chunks",
        {**GREEDY, "prompt_logprobs": 20},
        without=("prompt_logprobs",),
        length=170,
    ),
    Feature(
        "prompt_logprobs, max_tokens = 1 (echo)",
        {**GREEDY, "max_tokens": 1, "prompt_logprobs": 1},
        without=("prompt_logprobs",),
        is_text=True,
    ),
    Feature("prompt in chunks", COMMON, length=300),
    Feature("n = 3", COMMON, n=3),
    Feature("n = 2 with prompt_logprobs", {**COMMON, "prompt_logprobs": 1}, without=("prompt_logprobs",), n=2),
    Feature("everything at once", _ALL_AT_ONCE, without=("repetition_penalty",)),
    Feature("constraint: JSON object", _constrained(_KIND.JSON_OBJECT, ""), without=("constraint",)),
    Feature("constraint: JSON schema", _constrained(_KIND.JSON_SCHEMA, SCHEMA), without=("constraint",)),
    Feature("constraint: regex", _constrained(_KIND.REGEX, "[A-Z][a-z]{2,8}@(one|two)[.]org"), ("constraint",)),
    Feature("constraint: choice", _constrained(_KIND.CHOICE, ["yes", "no", "perhaps"]), without=("constraint",)),
    Feature(
        "constraint: grammar",
        _constrained(_KIND.GRAMMAR, 'root ::= term (" + " term){2,4}\nterm ::= "0" | [1-9] [0-9]?'),
        without=("constraint",),
    ),
    Feature("constraint: structural tag", _constrained(_KIND.STRUCTURAL_TAG, TAG), without=("constraint",)),
    Feature(
        "constraint with penalties, bias and n = 2",
        _constrained(_KIND.JSON_SCHEMA, SCHEMA, repetition_penalty=1.3, top_p=0.9, logit_bias={40: 2.0}, max_tokens=40),
        without=("repetition_penalty",),
        n=2,
    ),
    Feature("chat", COMMON, chat=_asked("Where is the river?")),
    Feature(
        "chat: named tool",
        {**COMMON, "max_tokens": 100},
        chat=_asked("Will it rain?", WEATHER, CLOCK, choice=NamedTool("get_weather")),
    ),
    Feature(
        "chat: required tool, one call",
        {**COMMON, "max_tokens": 100},
        chat=_asked("And then?", WEATHER, CLOCK, choice="required", is_parallel=False),
    ),
    Feature(
        "chat: required tools, cut by max_tokens, with prompt_logprobs",
        {**COMMON, "max_tokens": 100, "prompt_logprobs": 0},
        chat=_asked("And now?", WEATHER, CLOCK, choice="required"),
    ),
    Feature("chat: tools, free to call", COMMON, chat=_asked("What is a tool?", WEATHER, choice="auto")),
    Feature(
        "chat: JSON schema",
        _constrained(_KIND.JSON_SCHEMA, SCHEMA),
        without=("constraint",),
        chat=_asked("Describe the cat."),
    ),
)


def seed_of(feature: Feature) -> int:
    return 1000 + 17 * FEATURES.index(feature)


def prompt_of(feature: Feature) -> str | tuple[int, ...]:
    """No two rows' prompts begin alike, so no row finds what another has left in a cache."""
    start = 41 * FEATURES.index(feature)
    ids = corpus()[start : start + feature.length]
    assert len(ids) == feature.length
    return text_of(ids) if feature.is_text else tuple(ids)
