"""The shapes of replies, for the OpenAPI document. Replies are written by hand, for speed; tests hold them to this."""

from typing import Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetails


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class NamedLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(NamedLogprob):
    top_logprobs: list[NamedLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs] | None


class PromptLogprob(BaseModel):
    logprob: float
    rank: int | None
    decoded_token: str


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ChatToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ChatToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class KvAccount(BaseModel):
    profile: str
    bytes: int
    wire_bytes: int
    tokens_sent: int
    tokens_held: int


class TimingAccount(BaseModel):
    queue_s: float
    route_s: float
    prefill_s: float
    ttft_s: float
    transfer_s: float
    first_decode_s: float
    tpot_s: float
    total_s: float


class PredictedAccount(BaseModel):
    ttft_s: float | None
    tpot_s: float | None


class ChoiceAccount(BaseModel):
    """How one choice was served."""

    index: int
    prefill_worker: str | None
    decode_worker: str | None
    mode: str
    mode_reason: str
    binding: str | None
    reason: str
    attempts: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    lossless: bool
    kv: KvAccount | None
    timing: TimingAccount
    predicted: PredictedAccount
    staleness_s: float | None


class ProvenanceAccount(BaseModel):
    weights_version: str
    dtype: str
    engine_version: str


class Account(BaseModel):
    """How a call was served, and what computed it."""

    request_id: str
    model: str
    seed: int
    provenance: ProvenanceAccount
    choices: list[ChoiceAccount]


class Reply(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None
    tandem: Account | None = Field(None, description="of a stream: in its last chunk")


class ChatCompletion(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallPiece(BaseModel):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallPiece] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Reply):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description="null only in chunks before the last")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str


class Status(BaseModel):
    status: str


class Version(BaseModel):
    version: str
