"""Shapes of replies that no fake cluster can make: special tokens, impossible ones, tool calls."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from core.request import Finish, FinishReason, PromptToken, TokenLogprob, TokenOutput
from router.chat.assembler import ChatFinish
from router.chat.events import ChatDelta, ContentDelta, ToolCallDelta
from router.generation.answer import Answer
from router.generation.chat_answer import ChatPiece
from router.generation.provenance import Provenance
from router.http.chat_reply import ChatChunks, ChatWhole
from router.http.chat_request import read_chat
from router.http.logprobs import CompletionLogprobs, TokenNames, chat_logprobs, prompt_logprobs
from router.http.reply_head import ReplyHead, fingerprint
from router.stream import Completion
from router.tokenizer import GatewayTokenizer
from tests.fakes.http import events_of

HEAD = ReplyHead("chatcmpl-1", 1_700_000_000, "m", "fp_1")
NAN_FREE = json.JSONEncoder(allow_nan=False)


@dataclass(frozen=True)
class Tokens:
    """A tokenizer of a few tokens."""

    words: tuple[bytes, ...]
    special: frozenset[int] = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        return self.words[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special


def names(*words: bytes, special: Sequence[int] = ()) -> TokenNames:
    return TokenNames(cast("GatewayTokenizer", Tokens(words, frozenset(special))))


def test_offsets_count_characters_of_the_text() -> None:
    words = names(b"<s>", b" caf", b"\xc3", b"\xa9", "\U0001f600".encode(), b"!", special=[0])
    tokens = [TokenOutput(index, index, -0.1) for index in range(6)]
    told = CompletionLogprobs(words, 0).of(tokens)
    assert told["tokens"] == ["<s>", " caf", "\ufffd", "\ufffd", "\U0001f600", "!"]
    assert told["text_offset"] == [0, 0, 4, 4, 5, 6]
    pieces = CompletionLogprobs(words, 0)
    offsets = [pieces.of([token])["text_offset"][0] for token in tokens]
    assert offsets == told["text_offset"]


def test_what_cannot_be_is_a_number_still() -> None:
    words = names(b"a", b"b")
    token = TokenOutput(0, 0, -math.inf, (TokenLogprob(1, -math.inf),))
    chat = chat_logprobs([token], words)
    assert chat[0]["logprob"] == chat[0]["top_logprobs"][0]["logprob"] == -9999.0
    assert CompletionLogprobs(words, 1).of([token])["top_logprobs"] == [{"a": -9999.0, "b": -9999.0}]
    assert "9999" in NAN_FREE.encode(prompt_logprobs([PromptToken(0, -math.inf)], words, 0))


def test_tokens_of_one_name_are_told_once_with_the_better_chance() -> None:
    words = names(b"\xc3", b"\xa9", b"x")
    token = TokenOutput(0, 2, -3.0, (TokenLogprob(0, -0.5), TokenLogprob(1, -1.0)))
    assert CompletionLogprobs(words, 2).of([token])["top_logprobs"] == [{"\ufffd": -0.5, "x": -3.0}]


def test_prompts_as_vllm_tells_them() -> None:
    words = names(b"a", b"b", b"c")
    scored = [
        PromptToken(0, None),
        PromptToken(1, -2.0, (TokenLogprob(2, -0.5), TokenLogprob(1, -2.0))),
        PromptToken(0, -9.0),
    ]
    assert prompt_logprobs(scored, words, 1) == [
        None,
        {
            "2": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
            "1": {"logprob": -2.0, "rank": None, "decoded_token": "b"},
        },
        {"0": {"logprob": -9.0, "rank": None, "decoded_token": "a"}},
    ]
    assert prompt_logprobs(scored, words, 2)[1] == {
        "2": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
        "1": {"logprob": -2.0, "rank": 2, "decoded_token": "b"},
    }


def test_fingerprints_tell_engines_apart() -> None:
    parts = [
        ("w", "f32", "1"),
        ("w", "f16", "1"),
        ("w2", "f32", "1"),
        ("w", "f32", "2"),
        ("wf", "32", "1"),
        ("", "", ""),
    ]
    assert len({fingerprint(Provenance(*one)) for one in parts}) == len(parts)


def completion(**changes: Any) -> Completion:
    placement = SimpleNamespace(
        prefill_worker="p", decode_worker="d", mode="remote_prefill", mode_reason="x", binding=None, reason="r",
        predicted_ttft_s=math.inf, predicted_tpot_s=0.1, staleness_s=0.0,
    )  # fmt: skip
    split = SimpleNamespace(queue_s=0.0, route_s=0.0, prefill_s=0.0, ttft_s=0.0, tpot_s=0.0, total_s=0.0)
    told = {
        "finish": Finish(FinishReason.STOP), "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1,
        "timing": split, "landed": None, "placement": placement, "num_asked": 1, **changes,
    }  # fmt: skip
    return cast("Completion", SimpleNamespace(**told))


def answer() -> Answer:
    request = SimpleNamespace(
        request_id="1", num_prompt_tokens=3, prompt_token_ids=(1, 2, 3), sampling=SimpleNamespace(seed=5)
    )
    facts = SimpleNamespace(requests=(request,), model="m", provenance=Provenance("w", "d", "e"), prompt_tokens=())
    return cast("Answer", facts)


def piece(*deltas: ChatDelta, tokens: int = 1, finish: ChatFinish | None = None) -> ChatPiece:
    outputs = [TokenOutput(index, index) for index in range(tokens)]
    return ChatPiece(0, deltas, outputs, completion() if finish else None, finish)


CALLS = [
    piece(ContentDelta("I look. ")),
    piece(tokens=1),  # not certain yet what it is
    piece(ToolCallDelta(0, "call_1", "look", ""), ToolCallDelta(0, "", "", '{"a"')),
    piece(ToolCallDelta(0, "", "", ": 1}"), ToolCallDelta(1, "call_2", "wait", "{}")),
    piece(finish="tool_calls", tokens=0),
]


def test_calls_in_chunks() -> None:
    fields = read_chat({"messages": [{"role": "user", "content": "x"}], "stream": True}, lambda _: False).fields
    chunks = ChatChunks(answer(), HEAD, fields, names())
    text = chunks.begin() + "".join(chunks.of([one]) for one in CALLS) + chunks.end()
    told = events_of(text)
    for chunk in told:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert [chunk["choices"][0]["delta"] for chunk in told] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "I look. "},
        {
            "tool_calls": [
                {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "call_2", "type": "function", "function": {"name": "wait", "arguments": "{}"}}
            ]
        },
        {},
    ]
    assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert told[-1]["tandem"]["choices"][0]["predicted"]["ttft_s"] is None  # JSON has no infinity


def test_calls_in_one_piece() -> None:
    fields = read_chat({"messages": [{"role": "user", "content": "x"}]}, lambda _: False).fields
    for pieces, content in ((CALLS, "I look. "), (CALLS[1:], None)):
        whole = ChatWhole(answer(), HEAD, fields, names())
        whole.add(pieces)
        told = json.loads(NAN_FREE.encode(whole.told()))
        ChatCompletion.model_validate(told, strict=True)
        message = told["choices"][0]["message"]
        assert message["content"] == content
        assert message["tool_calls"] == [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "wait", "arguments": "{}"}},
        ]
        assert told["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_tokens_without_text_are_told_where_they_were_asked_for() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "logprobs": True, "return_token_ids": True}
    chunks = ChatChunks(answer(), HEAD, read_chat(body, lambda _: False).fields, names(b"a"))
    assert events_of(chunks.begin())[0]["prompt_token_ids"] == [1, 2, 3]
    told = events_of(chunks.of([piece(tokens=1)]))
    assert [chunk["choices"][0]["delta"] for chunk in told] == [{}]
    assert told[0]["choices"][0]["token_ids"] == [0]
    assert told[0]["choices"][0]["logprobs"]["content"][0]["token"] == "a"
    assert chunks.of([piece(tokens=0)]) == ""
