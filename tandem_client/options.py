"""Keyword arguments of the calls; what is left out takes the gateway's default (protos/inference.proto).

Ranges are checked by the gateway, which names the offending field.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from core.constraint import Constraint
from tandem_client.types import Service, Tool, ToolChoice


class Sampling(TypedDict, total=False):
    """How to choose tokens. `constraint`: what the text must be, made by `tandem_client.constraints`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    max_tokens: int
    seed: int
    logprobs: int
    prompt_logprobs: int
    constraint: Constraint


class Options(Sampling, total=False):
    """Sampling, and how the call is to be served.

    Keys:
        model: empty: the only one served.
        request_id: a name of yours for `abort` and logs; empty: one is made.
        deadline_s: for all of it, retries included; the gateway's default otherwise.
        kv_quality: of the KV cache on its way between two workers: exact, high, balanced, or the least token agreement
            of its compression profile, in [0, 1]; the cluster's default otherwise.
        handoff_budget_s: the KV cache may arrive so long after the first token; as soon as it can otherwise.
        service: what it is for, and what it needs.
        resume_window_s: above 0: when the connection is lost, the request goes on for so long, and the client reads on
            where it was, at any gateway that it can reach.
    """

    model: str
    request_id: str
    deadline_s: float | None
    kv_quality: str | float | None
    handoff_budget_s: float | None
    service: Service
    resume_window_s: float | None


class ChatOptions(Options, total=False):
    """Options of a conversation.

    Keys:
        tools: that the model may call.
        tool_choice: None: auto with tools, none without.
        parallel_tool_calls: False: at most one call.
        template_arguments: variables for the model's chat template, such as enable_thinking.
    """

    tools: Sequence[Tool]
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool | None
    template_arguments: Mapping[str, Any] | None
