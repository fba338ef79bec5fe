"""Calls that a choice of tools forces, by the tiny model itself: prompt, grammar, tokens, text and message are real.

The model knows nothing of tools; whatever it would rather write, it calls. Its padding token is renamed to a mark of
Mistral's, so that calls begin with a special token, which is no text to anybody else."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.clock import MonotonicClock
from core.constraint import Constraint
from core.ids import RequestId
from core.request import Finish, GenerateRequest, SamplingParams, TokenOutput
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.runner import ModelRunner
from grammar.config import GrammarConfig
from grammar.host import ModelTokens
from grammar.library import GrammarLibrary
from grammar.walk import Grammar
from router.chat.assembler import ChatAssembler
from router.chat.events import ContentDelta
from router.chat.messages import ChatCall, ChatMessage, Tool, ToolChoice, ToolChoiceMode
from router.chat.plan import ChatPlan, plan_chat
from router.chat.tool_formats.known import ToolFormatName
from router.generation.text import GenerationText
from router.tokenizer import GatewayTokenizer
from tests.constrained import EOS, TINY, VOCAB_SIZE

MARK = "[TOOL_CALLS]"
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["unit", "days"],
}
WEATHER, CLOCK = Tool("get_weather", "Weather", json.dumps(SCHEMA)), Tool("now", "Time")
REQUIRED = ToolChoice(ToolChoiceMode.REQUIRED)
NAMED = ToolChoice(ToolChoiceMode.NAMED, "get_weather")
Message = tuple[str, list[tuple[str, str]], str]  # content, calls with their arguments, finish reason


@dataclass(frozen=True)
class Model:
    folder: Path
    runner: ModelRunner
    loop: asyncio.Runner
    grammars: GrammarLibrary

    def answers(self, tokenizer: GatewayTokenizer, plan: ChatPlan, n: int) -> list[Message]:
        """Generate together."""
        engine = Engine(self.runner, EngineConfig(block_size=8), tokenizer.detokenizer)
        prompt = tuple(tokenizer.encode_chat(plan.prompt.messages, plan.prompt.tools))
        assert plan.constraint is not None
        grammar = self.loop.run(self._grammar(plan.constraint))
        requests = [
            GenerateRequest(
                RequestId(f"r{seed}"), prompt, SamplingParams(max_tokens=200, seed=seed, constraint=plan.constraint)
            )
            for seed in range(n)
        ]
        for request in requests:
            engine.add(request)
            engine.supply(request.request_id, grammar)
        readers = {
            one.request_id: (GenerationText(tokenizer.detokenizer, one, plan.spoken_tokens), ChatAssembler(plan, ident))
            for one in requests
        }
        messages: dict[str, Message] = {one.request_id: ("", [], "") for one in requests}
        for _ in range(3000):
            if not engine.has_work():
                break
            for output in engine.step():
                text, assembler = readers[output.request_id]
                messages[output.request_id] = told(
                    messages[output.request_id], text, assembler, output.tokens, output.finish
                )
        return list(messages.values())

    async def _grammar(self, constraint: Constraint) -> Grammar:
        return await self.grammars.get(constraint)


def ident() -> str:
    return "x" * 24


def told(
    message: Message,
    text: GenerationText,
    assembler: ChatAssembler,
    tokens: tuple[TokenOutput, ...],
    finish: Finish | None,
) -> Message:
    content, calls, reason = message
    for delta in assembler.push(text.push(tokens, finish), finish is not None):
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif delta.name:
            calls.append((delta.name, delta.arguments))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return content, calls, assembler.finish_reason(finish) if finish is not None else reason


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("model")
    for path in TINY.iterdir():
        shutil.copy(path, folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|pad|>", MARK))
    runner = ModelRunner.load(ModelConfig(path=folder), EngineConfig(block_size=8, num_blocks=256))
    with asyncio.Runner() as loop, opened(loop, folder) as grammars:
        yield Model(folder, runner, loop, grammars)


@contextmanager
def opened(loop: asyncio.Runner, folder: Path) -> Iterator[GrammarLibrary]:
    async def make() -> GrammarLibrary:
        return GrammarLibrary(GrammarConfig(), ModelTokens(folder, VOCAB_SIZE, (EOS,)), MonotonicClock())

    grammars = loop.run(make())
    yield grammars
    loop.run(grammars.close())


@pytest.mark.parametrize("tool_format", ["hermes", "mistral_named", "mistral", "llama3_json", "qwen3_coder"])
def test_the_model_calls_what_it_must(model: Model, tool_format: ToolFormatName) -> None:
    tokenizer = GatewayTokenizer.load(model.folder, tool_format=tool_format)
    user = (ChatMessage("user", "What is the weather?"),)
    for choice, is_parallel in ((REQUIRED, False), (NAMED, True)):
        plan = plan_chat(ChatCall(user, (WEATHER, CLOCK), choice, is_parallel), tokenizer.chat_style)
        assert set(plan.spoken_tokens.values()) == ({MARK} if tool_format.startswith("mistral") else set())
        for content, calls, reason in model.answers(tokenizer, plan, 3):
            assert (content, reason) == ("", "tool_calls")
            ((name, arguments),) = calls
            if name == "now" and choice is REQUIRED:
                assert json.loads(arguments) == {}
            else:
                values = json.loads(arguments)
                assert name == "get_weather"
                assert values["unit"] in ("C", "F")
                assert 1 <= values["days"] <= 9


def test_an_answer_is_of_its_form_or_a_call(model: Model) -> None:
    tokenizer = GatewayTokenizer.load(model.folder)
    strict = Tool(WEATHER.name, parameters=WEATHER.parameters, strict=True)
    user = (ChatMessage("user", "What is the weather?"),)
    plan = plan_chat(ChatCall(user, (strict,)), tokenizer.chat_style)
    for content, calls, reason in model.answers(tokenizer, plan, 2):
        assert content or calls, "it is free to answer"
        assert reason in ("stop", "length", "tool_calls")
        if reason == "tool_calls":
            assert all(json.loads(arguments)["unit"] in ("C", "F") for _, arguments in calls)
