"""The fields that chat and text completions share, and what they mean for sampling.

OpenAI's own, and those that vLLM and SGLang added and their clients send."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, WithJsonSchema

from core.constraint import Constraint
from core.errors import InvalidRequest
from core.request import MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams
from core.service_class import ServiceClass
from router.http.constraint_fields import ConstraintFields
from router.http.fields import Integer, Items, RequestModel
from router.service_terms import MAX_PRIORITY

MAX_SEED = 2**63
"""Seeds are signed in OpenAI's API; ours are not, so negative ones count from the end."""

UNSERVED: Mapping[str, Sequence[object]] = {
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "stop_regex": ([], ""),
    "logits_processors": ([],),
    "custom_logit_processor": ("",),
    "custom_params": ({},),
    "cache_salt": ("",),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "lora_path": ("",),
    "return_hidden_states": (False,),
    "repetition_detection": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "prompt_cache_options": ({},),
    "guided_whitespace_pattern": (),
    "guided_decoding_backend": ("auto", "xgrammar"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "moderation": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "web_search_options": (),
    "verbosity": ("medium",),
    "store": (False,),
    "suffix": ("",),
    "documents": ([],),
    "chat_template": ("",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "thinking": (),
    "thinking_token_budget": (),
}
"""What neither API serves. Values that change nothing are taken. What only one of them serves, the other has in its own
table: a field that is known is nowhere dropped."""

WITHOUT_EFFECT = frozenset({"metadata", "user", "safety_identifier"})
"""Labels of a request that never touch its answer: of stored answers, and of who asks."""

ServiceTier = Literal["auto", "default", "scale", "flex", "priority", "fast"]
_TIERS: Mapping[ServiceTier, tuple[ServiceClass | None, int]] = {
    "auto": (None, 0),
    "default": (None, 0),
    "scale": (None, 0),
    "flex": (ServiceClass.BATCH, 0),
    "priority": (ServiceClass.INTERACTIVE, MAX_PRIORITY // 2),
    "fast": (ServiceClass.INTERACTIVE, MAX_PRIORITY // 2),
}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Strings = Annotated[
    Items[str],
    BeforeValidator(_as_list),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOP_STRINGS}]}
    ),
]


def _few(biases: object) -> object:
    if isinstance(biases, dict) and len(biases) > MAX_LOGIT_BIASES:
        raise ValueError(f"has {len(biases)} entries, at most {MAX_LOGIT_BIASES} are allowed")
    return biases


def _between(low: float, high: float) -> dict[str, JsonValue]:
    """For the document: ranges are checked in one place for all surfaces."""
    return {"minimum": low, "maximum": high}


class StreamOptions(RequestModel):
    """How an answer is streamed."""

    include_usage: bool | None = Field(None, description="a last chunk without choices tells the usage")
    continuous_usage_stats: bool | None = Field(None, description="every chunk tells the usage so far")
    include_obfuscation: bool | None = Field(None, description="only false is served")


class SamplingFields(ConstraintFields):
    """How tokens are chosen, how many answers there are, and how they are delivered."""

    model: str | None = Field(None, description="absent: the only model served")
    temperature: float | None = Field(None, description="0 is greedy", json_schema_extra=_between(0, 100))
    top_p: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    top_k: Integer | None = Field(None, description="0 and -1 keep all tokens", json_schema_extra={"minimum": -1})
    min_p: float | None = Field(None, json_schema_extra=_between(0, 1))
    presence_penalty: float | None = Field(None, json_schema_extra=_between(-2, 2))
    frequency_penalty: float | None = Field(None, json_schema_extra=_between(-2, 2))
    repetition_penalty: float | None = Field(None, json_schema_extra=_between(0.01, 100))
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few)] = Field(
        None, description="by token id", json_schema_extra={"propertyNames": {"pattern": "^[0-9]+$"}}
    )
    seed: Integer | None = Field(None, json_schema_extra=_between(-MAX_SEED, 2 * MAX_SEED - 1))
    stop: Strings | None = None
    stop_token_ids: Items[Integer] | None = None
    ignore_eos: bool | None = None
    max_tokens: Integer | None = Field(None, json_schema_extra={"minimum": 1})
    max_completion_tokens: Integer | None = Field(
        None, description="what replaces max_tokens", json_schema_extra={"minimum": 1}
    )
    min_tokens: Integer | None = Field(None, json_schema_extra={"minimum": 0})
    n: Integer | None = Field(
        None, description="answers; answer i is sampled with the seed + i", json_schema_extra={"minimum": 1}
    )
    best_of: Integer | None = Field(None, description="only as many as n", json_schema_extra={"minimum": 1})
    prompt_logprobs: Integer | None = Field(
        None, description="of every prompt token, and so many alternatives", json_schema_extra=_between(0, MAX_LOGPROBS)
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: ServiceTier | None = Field(
        None, description="flex: of the class batch; priority and fast: ahead of the tenant's others"
    )
    priority: Integer | None = Field(
        None,
        description="as in vLLM: a smaller number goes first; -10 to 10",
        json_schema_extra=_between(-MAX_PRIORITY, MAX_PRIORITY),
    )
    prompt_cache_key: str | None = Field(None, description="as a session: requests with the same key go together")
    request_id: str | None = Field(None, description="as the header x-request-id")
    return_token_ids: bool | None = Field(None, description="token ids beside the text")
    return_tokens_as_token_ids: bool | None = Field(None, description="tokens of logprobs as token_id:<id>")

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def max_tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def most_tokens(self) -> int | None:
        """Return how long an answer may be, if the body says so. Raises: InvalidRequest, when it says two things."""
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise InvalidRequest("max_tokens", "contradicts max_completion_tokens, which replaces it")
        return both.pop() if both else None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def service(self) -> tuple[ServiceClass | None, int | None]:
        """Return the class and priority that the body asks for."""
        service_class, tier_priority = _TIERS[self.service_tier or "auto"]
        if self.priority is not None:
            return service_class, -self.priority
        return service_class, tier_priority or None

    def check_delivery(self) -> None:
        """Raises: InvalidRequest, about what no sampling parameter says."""
        if self.best_of is not None and self.best_of != self.num_choices:
            raise InvalidRequest("best_of", "is not supported beyond n: every answer is returned")
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidRequest("stream_options", "is only allowed when stream is true")
            if self.stream_options.include_obfuscation:
                raise InvalidRequest("stream_options.include_obfuscation", "is not supported by this server")

    def sampling(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        constraint: Constraint | None,
    ) -> SamplingParams:
        """Return the parameters; ranges are checked later, in one place for all surfaces.

        Raises:
            InvalidRequest: what those ranges cannot say.
        """
        default = SamplingParams()
        stop_token_ids = tuple(self.stop_token_ids or ())
        return SamplingParams(
            temperature=_or(self.temperature, default.temperature),
            top_k=0 if self.top_k in (None, -1) else self.top_k or 0,
            top_p=_or(self.top_p, default.top_p),
            min_p=_or(self.min_p, default.min_p),
            presence_penalty=_or(self.presence_penalty, default.presence_penalty),
            frequency_penalty=_or(self.frequency_penalty, default.frequency_penalty),
            repetition_penalty=_or(self.repetition_penalty, default.repetition_penalty),
            logit_bias=_read_bias(self.logit_bias or {}),
            stop=tuple(self.stop or ()),
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            max_tokens=default.max_tokens if max_tokens is None else max_tokens,
            seed=_read_seed(self.seed),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
        )


def check_alternatives(field: str, count: int | None) -> None:
    """Raises: InvalidRequest, unless so many alternatives per token can be told."""
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise InvalidRequest(field, f"must be in [0, {MAX_LOGPROBS}], got {count}")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _read_seed(seed: int | None) -> int:
    if seed is None:
        return 0
    if not -MAX_SEED <= seed < 2 * MAX_SEED:
        raise InvalidRequest("seed", "must fit in 64 bits")
    return seed % (2 * MAX_SEED)


def _read_bias(biases: Mapping[str, float]) -> dict[int, float]:
    read: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise InvalidRequest("logit_bias", f"{key[:32]!r} is no token id")
        read[int(key)] = bias
    if len(read) != len(biases):
        raise InvalidRequest("logit_bias", "names a token id twice")
    return read
