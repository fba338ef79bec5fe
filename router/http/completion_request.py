"""`/v1/completions`: a body to prompts and parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from core.errors import InvalidRequest
from core.request import MAX_LOGPROBS, SamplingParams
from router.http.fields import MAX_ITEMS, Integer, read_fields
from router.http.sampling_fields import UNSERVED, SamplingFields, check_alternatives
from router.intake import TextPrompt, TokenPrompt

DEFAULT_MAX_TOKENS = 16  # OpenAI's own
UNSERVED_COMPLETION: Mapping[str, Sequence[object]] = {
    **UNSERVED,
    "messages": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "top_logprobs": (),
    "reasoning_effort": ("none",),
    "chat_template_kwargs": ({},),
}


def _read_prompts(value: Any) -> list[TextPrompt | TokenPrompt]:
    """Return the prompts. Lists of numbers are long, so they are looked at by hand, and only once."""
    match value:
        case str():
            return [TextPrompt(value)]
        case []:
            raise ValueError("must not be empty")
        case [int(), *_]:
            return [_token_prompt(value)]
        case [_, *_] if len(value) > MAX_ITEMS and not isinstance(value[0], int):
            raise ValueError(f"must have at most {MAX_ITEMS} prompts")
        case [str(), *_] if all(type(one) is str for one in value):
            return [TextPrompt(one) for one in value]
        case [list(), *_] if all(type(one) is list for one in value):
            return [_token_prompt(one) for one in value]
        case _:
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")


def _token_prompt(ids: list[Any]) -> TokenPrompt:
    if not all(type(one) is int and one >= 0 for one in ids):
        raise ValueError("token ids must be integers, none of them negative")
    if not ids:
        raise ValueError("a list of token ids must not be empty")
    return TokenPrompt(tuple(ids))


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
Prompts = Annotated[
    Any,
    BeforeValidator(_read_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


class CompletionRequest(SamplingFields):
    """One or several prompts that are to be continued."""

    prompt: Prompts
    max_tokens: Integer | None = Field(
        None,
        description=f"absent: {DEFAULT_MAX_TOKENS}; 0: only what echo tells of the prompt",
        json_schema_extra={"minimum": 0},
    )
    max_completion_tokens: Integer | None = Field(None, description="as max_tokens", json_schema_extra={"minimum": 0})
    add_special_tokens: bool | None = Field(
        None, description="false: a text is not given the markers, such as for its beginning, that it may have already"
    )
    echo: bool | None = Field(None, description="the prompt comes first in the text, and in logprobs")
    logprobs: Integer | None = Field(
        None,
        description="of every token, and so many alternatives",
        json_schema_extra={"minimum": 0, "maximum": MAX_LOGPROBS},
    )


@dataclass(frozen=True, slots=True)
class CompletionOrder:
    """What a completion body asks for.

    Attributes:
        is_prompt_only: nothing of what is generated is told: a token must be, for the prompt to be computed.
    """

    fields: CompletionRequest
    prompts: tuple[TextPrompt | TokenPrompt, ...]
    sampling: SamplingParams
    constraint_field: str
    is_prompt_only: bool


def read_completion(body: Mapping[str, Any], max_choices: int) -> CompletionOrder:
    """Raises: InvalidRequest, naming the field."""
    fields = read_fields(CompletionRequest, body, UNSERVED_COMPLETION)
    fields.check_delivery()
    if len(fields.prompt) > max_choices:
        raise InvalidRequest("prompt", f"has {len(fields.prompt)} prompts, at most {max_choices} are allowed")
    check_alternatives("logprobs", fields.logprobs)
    check_alternatives("prompt_logprobs", fields.prompt_logprobs)
    constraint, constraint_field = fields.constraint()
    max_tokens = fields.most_tokens()
    if max_tokens is None:
        max_tokens = max(DEFAULT_MAX_TOKENS, fields.min_tokens or 0)
    is_prompt_only = max_tokens == 0
    sampling = fields.sampling(
        max_tokens=1 if is_prompt_only else max_tokens,
        logprobs=fields.logprobs,
        prompt_logprobs=_scores(fields),
        constraint=constraint,
    )
    prompts = tuple(_with_markers(prompt, fields.add_special_tokens is not False) for prompt in fields.prompt)
    return CompletionOrder(fields, prompts, sampling, constraint_field, is_prompt_only)


def _with_markers(prompt: TextPrompt | TokenPrompt, with_markers: bool) -> TextPrompt | TokenPrompt:
    return TextPrompt(prompt.text, with_markers) if isinstance(prompt, TextPrompt) else prompt


def _scores(fields: CompletionRequest) -> int | None:
    """An echoed prompt is scored as the answer is."""
    asked = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    return max((one for one in asked if one is not None), default=None)
