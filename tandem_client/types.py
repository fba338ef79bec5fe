"""What a client is given: plain frozen facts, no protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple


class ToolCall(NamedTuple):
    """A call that the model made. `arguments`: JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(NamedTuple):
    """One message of a chat.

    Attributes:
        role: system, user, assistant, tool, or what else the model's chat template knows.
        name: of who speaks, for templates that tell them apart.
        tool_calls: of an assistant's message.
        tool_call_id: of a tool's message: the call that it answers.
    """

    role: str
    content: str = ""
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: letters, digits, underscores and dashes, at most 64.
        parameters: JSON schema of the arguments.
        strict: the arguments are held to the schema while they are generated.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The choice of exactly this function."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool
"""auto: the model decides; none: the answer is text; required: at least one call."""


class FinishReason(StrEnum):
    """Why an answer ended well."""

    STOP = "stop"  # end of sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    TOOL_CALLS = "tool_calls"  # of a chat: what follows is the results of the calls


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood at some position."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `index` counts from 0 without gap. With log-probabilities it has a text, too."""

    index: int
    token_id: int
    logprob: float | None
    alternatives: tuple[Alternative, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One scored token of a prompt. `logprob` is None for the first: nothing came before it."""

    token_id: int
    logprob: float | None
    alternatives: tuple[Alternative, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """What computed an answer."""

    weights_version: str = ""
    dtype: str = ""
    engine_version: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """What is known when the first token arrives.

    Attributes:
        seed: choice i was sampled with seed + i.
        prompt_tokens: how many.
        prompt_scores: of every prompt token, when asked for.
    """

    request_id: str
    model: str
    seed: int
    prompt_tokens: int
    prompt_scores: tuple[PromptToken, ...]
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. queue + route + prefill = ttft."""

    queue_s: float
    route_s: float
    prefill_s: float
    transfer_s: float
    first_decode_s: float
    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Service:
    """What a request is for, and what it needs; what is left out is the cluster's to say.

    Attributes:
        service_class: interactive, deadline or batch.
        priority: against the tenant's own requests, -10 to 10, larger first.
        ttft_s, tpot_s: targets for the time to first token and per token after it. Seconds.
        deadline_s: target for the whole answer, from arrival. (How long the call may take is another thing.)
        session_id: requests of one session go to the same workers while that costs nothing.
    """

    service_class: str = ""
    priority: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Who served the request and why, and what its KV cache cost on the way.

    Attributes:
        reason: why these workers; `mode_reason`: why this mode.
        mode: remote_prefill, local_prefill or colocated.
        binding: of a remote prefill, when the decode worker was chosen: early (before it began) or late.
        predicted_ttft_s, predicted_tpot_s: by the decision that was carried out.
        staleness_s: age of the shared state that the decision rested on.
        kv_bytes: of the KV that was sent, before compression; `kv_wire_bytes` is what crossed.
        kv_profile: compression profile; empty when nothing was transferred.
        kv_lossless: the KV that the decode worker went on from is equal bit for bit to the prefill worker's.
    """

    prefill_worker: str
    decode_worker: str
    reason: str
    attempts: int
    kv_bytes: int
    kv_tokens_sent: int
    kv_tokens_held: int
    kv_profile: str
    kv_lossless: bool = True
    kv_wire_bytes: int = 0
    mode: str = ""
    mode_reason: str = ""
    binding: str = ""
    predicted_ttft_s: float = 0.0
    predicted_tpot_s: float = 0.0
    staleness_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """How an answer ended. `matched_stop` is the stop string or the id of the stop token that ended it.

    Attributes:
        seed: of the call; this choice was sampled with seed + choice.
        choice: of the n answers.
    """

    request_id: str
    model: str
    seed: int
    finish_reason: FinishReason
    matched_stop: str | int | None
    usage: Usage
    timing: Timing
    placement: Placement
    choice: int = 0
    provenance: Provenance = Provenance()


@dataclass(frozen=True, slots=True)
class Piece:
    """News of a generation. The last piece of each choice, and only it, has a summary.

    Attributes:
        choice: of the n answers.
        text: what became certain; may lag behind the tokens.
    """

    started: Started
    choice: int
    text: str
    tokens: tuple[Token, ...]
    summary: Summary | None = None

    @property
    def request_id(self) -> str:
        return self.started.request_id

    @property
    def seed(self) -> int:
        return self.started.seed


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole generation."""

    text: str
    tokens: tuple[Token, ...]
    summary: Summary
    prompt_scores: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """The next piece of a tool call. `id` and `name` only in its first piece.

    Attributes:
        index: among the calls of this choice.
        arguments: the next piece of the JSON text.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """News of a message. The last piece of each choice, and only it, has a summary.

    Attributes:
        choice: of the n answers.
        content, tool_calls: what became certain; may lag behind the tokens.
    """

    started: Started
    choice: int
    content: str
    tool_calls: tuple[ToolCallPiece, ...]
    tokens: tuple[Token, ...]
    summary: Summary | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole message of the model."""

    message: Message
    tokens: tuple[Token, ...]
    summary: Summary
    prompt_scores: tuple[PromptToken, ...] = ()
