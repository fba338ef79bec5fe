"""What is right: one engine in this process, without a prefix cache, that is given one request at a time.

Its texts are the tokens' own, decoded whole and cut where the engine says that a stop string matched; messages of chats
are read out of whole texts. So neither the pieces in which a gateway gets tokens nor its own reading play a part.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.clock import MonotonicClock
from core.constraint import Constraint
from core.ids import RequestId
from core.request import Finish, GenerateRequest, PromptToken, SamplingParams, TokenOutput
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from grammar.config import GrammarConfig
from grammar.host import ModelTokens
from grammar.library import GrammarLibrary
from router.chat.messages import ChatCall, ChatMessage, ToolChoice, ToolChoiceMode
from router.chat.messages import Tool as ChatTool
from router.chat.plan import plan_chat
from router.tokenizer import GatewayTokenizer
from tandem_client import NamedTool
from tests.model_matrix import TINY_PATH
from tests.parity.answers import Answer, Choice, Scored
from tests.parity.features import EOS, Chat, Feature, prompt_of, seed_of
from tests.parity.texts import ids_of, text_of

ENGINE: Mapping[str, Any] = {"max_batch_tokens": 64, "num_threads": 1, "mask_wait_s": 5.0, "mask_timeout_s": 60.0}
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_MAX_STEPS = 2000


class SingleEngine:
    """See the module. Made for one event loop; `close` ends the processes of its grammars."""

    def __init__(self) -> None:
        config = EngineConfig.model_validate({**ENGINE, "num_blocks": 64, "prefix_cache": False})
        self._engine = Engine.load(ModelConfig(path=TINY_PATH, dtype="float32"), config)
        self._tokenizer = GatewayTokenizer.load(TINY_PATH)
        self._library = GrammarLibrary(
            GrammarConfig(), ModelTokens(TINY_PATH, self._engine.model_info.vocab_size, (EOS,)), MonotonicClock()
        )

    async def close(self) -> None:
        await self._library.close()

    async def options(self, feature: Feature) -> Mapping[str, Any]:
        """Return the row's whole options."""
        if feature.added is None:
            return feature.options
        return {**feature.options, **feature.added(await self.answer(feature, feature.options))}

    async def answer(self, feature: Feature, options: Mapping[str, Any]) -> Answer:
        """Generate what `options` of the row give."""
        token_ids, constraint, has_calls = self._prompt(feature, options)
        params = SamplingParams(**{**options, "constraint": constraint, "seed": seed_of(feature)})
        choices = []
        scores: tuple[PromptToken, ...] = ()
        for number in range(feature.n):
            sampling = replace(params, seed=params.seed + number)
            tokens, finish, scored = await self._run(GenerateRequest(RequestId("r"), token_ids, sampling))
            scores = scores or scored
            choices.append(_choice(tokens, finish, has_calls=has_calls))
        return Answer(tuple(choices), len(token_ids), tuple(map(_scored, scores)))

    def _prompt(self, feature: Feature, options: Mapping[str, Any]) -> tuple[tuple[int, ...], Constraint | None, bool]:
        constraint = options.get("constraint")
        if feature.chat is None:
            prompt = prompt_of(feature)
            if isinstance(prompt, str):
                prompt = ids_of(prompt)
            return prompt, constraint, False
        plan = plan_chat(_chat_call(feature.chat, constraint), self._tokenizer.chat_style)
        ids = self._tokenizer.encode_chat(plan.prompt.messages, plan.prompt.tools, plan.prompt.template_arguments)
        return tuple(ids), plan.constraint, plan.tools is not None

    async def _run(self, request: GenerateRequest) -> tuple[list[TokenOutput], Finish, tuple[PromptToken, ...]]:
        engine, constraint = self._engine, request.sampling.constraint
        engine.add(request)
        if constraint is not None:
            engine.supply(request.request_id, await self._library.get(constraint))
        tokens: list[TokenOutput] = []
        scores: tuple[PromptToken, ...] = ()
        for _ in range(_MAX_STEPS):
            for output in engine.step():
                tokens += output.tokens
                scores = scores or output.prompt_tokens
                if output.finish is not None:
                    return tokens, output.finish, scores
        raise AssertionError(f"no end: {engine.take_failed()}")


def _chat_call(chat: Chat, constraint: Constraint | None) -> ChatCall:
    choice: ToolChoice | None = None
    if isinstance(chat.choice, NamedTool):
        choice = ToolChoice(ToolChoiceMode.NAMED, chat.choice.name)
    elif chat.choice is not None:
        choice = ToolChoice(ToolChoiceMode(chat.choice))
    return ChatCall(
        tuple(ChatMessage(message.role, message.content) for message in chat.messages),
        tuple(
            ChatTool(tool.name, tool.description, json.dumps(tool.parameters, ensure_ascii=False), tool.strict)
            for tool in chat.tools
        ),
        choice,
        chat.is_parallel is not False,
        constraint=constraint,
    )


def _scored(token: TokenOutput | PromptToken) -> Scored:
    return Scored(token.token_id, token.logprob, tuple((one.token_id, one.logprob) for one in token.top_logprobs))


def _choice(tokens: list[TokenOutput], finish: Finish, *, has_calls: bool) -> Choice:
    ids = [token.token_id for token in tokens]
    assert [token.index for token in tokens] == list(range(len(tokens)))
    if isinstance(finish.matched_stop, int) and ids[-1] == finish.matched_stop:
        ids.pop()
    text = text_of(ids)
    if isinstance(finish.matched_stop, str):
        text = text[: text.index(finish.matched_stop)]
    scored, reason = tuple(map(_scored, tokens)), str(finish.reason)
    calls: list[tuple[str, str]] = []
    if has_calls and (found := _CALL.findall(text)):
        calls = [(call["name"], json.dumps(call["arguments"])) for call in map(json.loads, found)]
        text = text[: text.index("<tool_call>")]
        reason = "tool_calls" if reason == "stop" else reason
    return Choice(text, scored, reason, finish.matched_stop, len(tokens), tuple(calls))
