"""Constrained generations of the tiny model: every finished text is valid, and nothing around them changes a token."""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from core.constraint import Constraint
from core.ids import RequestId
from core.request import FinishReason, GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.runner import ModelRunner
from grammar.walk import Grammar
from tests.constrained import ALL, EOS, OBJECT, PERSON, REGEX, TINY, WORDS, assert_valid, library, text_of, vocabulary

PROMPT = tuple(vocabulary().encode("Return a value that describes the file ", with_markers=True))
_names = (f"r{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def runners() -> tuple[ModelRunner, ModelRunner]:
    def load(block_size: int, num_blocks: int) -> ModelRunner:
        return ModelRunner.load(ModelConfig(path=TINY), EngineConfig(block_size=block_size, num_blocks=num_blocks))

    return load(8, 256), load(4, 512)


@pytest.fixture(scope="module")
def grammars() -> Iterator[dict[Constraint, Grammar]]:
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()

        async def compile_all() -> dict[Constraint, Grammar]:
            made = await stack.enter_async_context(library())
            return {constraint: await made.get(constraint) for constraint in (*ALL.values(), WORDS)}

        yield runner.run(compile_all())
        runner.run(stack.aclose())


def engine(runner: ModelRunner, **settings: object) -> Engine:
    size = runner.pool.layout.block_size
    config = EngineConfig.model_validate({"block_size": size, "mask_wait_s": 5.0, "mask_timeout_s": 20.0, **settings})
    return Engine(runner, config, vocabulary().detokenizer)


def request(constraint: Constraint | None, prompt: tuple[int, ...] = PROMPT, **changes: object) -> GenerateRequest:
    params = SamplingParams(**{"temperature": 0.9, "max_tokens": 160, "constraint": constraint, **changes})  # type: ignore[arg-type]
    return GenerateRequest(RequestId(next(_names)), prompt, params)


def generate(
    engine: Engine, wanted: list[GenerateRequest], grammars: dict[Constraint, Grammar]
) -> list[tuple[list[int], FinishReason]]:
    """Run all together; return tokens and end of each."""
    for one in wanted:
        engine.add(one)
    return finish(engine, wanted, grammars)


def finish(
    engine: Engine, wanted: list[GenerateRequest], grammars: dict[Constraint, Grammar]
) -> list[tuple[list[int], FinishReason]]:
    for one in wanted:
        if one.sampling.constraint is not None:
            engine.supply(one.request_id, grammars[one.sampling.constraint])
    tokens: dict[str, list[int]] = {one.request_id: [] for one in wanted}
    ends: dict[str, FinishReason] = {}
    for _ in range(5000):
        if not engine.has_work():
            break
        for output in engine.step():
            assert output.request_id not in ends
            for token in output.tokens:
                assert token.index == len(tokens[output.request_id])
                tokens[output.request_id].append(token.token_id)
            if output.finish is not None:
                ends[output.request_id] = output.finish.reason
        engine.check()
        assert not engine.take_failed()
    return [(tokens[one.request_id], ends[one.request_id]) for one in wanted]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_every_finished_text_is_valid(
    name: str, temperature: float, runners: tuple[ModelRunner, ModelRunner], grammars: dict[Constraint, Grammar]
) -> None:
    constraint = ALL[name]
    wanted = [request(constraint, seed=seed, temperature=temperature, max_tokens=200) for seed in range(6)]
    finished = 0
    for tokens, reason in generate(engine(runners[0]), wanted, grammars):
        if reason is FinishReason.STOP:
            finished += 1
            assert EOS not in tokens[:-1]
            assert constraint is ALL["grammar"] or EOS not in tokens, "what can only end here ends without a token"
            assert_valid(constraint, text_of(tokens))
        else:
            assert len(tokens) == 200
    assert finished or constraint in (OBJECT, ALL["grammar"]) or temperature == 0, "some ends are found by chance"


def test_a_text_cut_by_its_length_says_so(
    runners: tuple[ModelRunner, ModelRunner], grammars: dict[Constraint, Grammar]
) -> None:
    whole = request(PERSON, seed=3)
    ((tokens, reason),) = generate(engine(runners[0]), [whole], grammars)
    assert reason is FinishReason.STOP
    cut = replace(whole.sampling, max_tokens=len(tokens) - 1)
    exact = replace(whole.sampling, max_tokens=len(tokens))
    wanted = [GenerateRequest(RequestId(next(_names)), PROMPT, params) for params in (cut, exact)]
    results = generate(engine(runners[0]), wanted, grammars)
    assert results == [(tokens[:-1], FinishReason.LENGTH), (tokens, FinishReason.STOP)]


def everything() -> list[GenerateRequest]:
    """Constrained requests of every kind, greedy and seeded, with and without penalties, and plain ones between."""
    wanted = []
    for seed, constraint in enumerate([*ALL.values(), None] * 2):
        changes: dict[str, object] = {"seed": seed, "max_tokens": 40, "temperature": 0.8 if seed % 3 else 0.0}
        if seed % 2:
            changes |= {"repetition_penalty": 1.3, "top_k": 40, "logit_bias": {seed: 2.0}}
        wanted.append(request(constraint, PROMPT + (seed + 7,) * (seed % 5), **changes))
    return wanted


@pytest.fixture(scope="module")
def alone(
    runners: tuple[ModelRunner, ModelRunner], grammars: dict[Constraint, Grammar]
) -> list[tuple[list[int], FinishReason]]:
    """Each of `everything` in an engine of its own."""
    return [generate(engine(runners[0]), [one], grammars)[0] for one in everything()]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens": 8}, {"prefix_cache": False, "max_num_requests": 3}],
    ids=["together", "small chunks", "few at once"],
)
def test_a_batch_changes_nothing(
    settings: dict[str, object],
    runners: tuple[ModelRunner, ModelRunner],
    grammars: dict[Constraint, Grammar],
    alone: list[tuple[list[int], FinishReason]],
) -> None:
    assert generate(engine(runners[0], **settings), everything(), grammars) == alone


def test_preemption_changes_nothing(
    grammars: dict[Constraint, Grammar], alone: list[tuple[list[int], FinishReason]]
) -> None:
    size = EngineConfig(block_size=4, num_blocks=34)
    small = Engine(ModelRunner.load(ModelConfig(path=TINY), size), size, vocabulary().detokenizer)
    num_preempted = 0
    step = small.step

    def counting() -> list[object]:
        nonlocal num_preempted
        outputs = step()
        num_preempted += small.last_step.num_preempted
        return outputs  # type: ignore[return-value]

    small.step = counting  # type: ignore[method-assign,assignment]
    assert generate(small, everything(), grammars) == alone
    assert num_preempted


class Copier:
    """Brings the KV of one prefill to where it is decoded."""

    def __init__(self, source: Engine, target: Engine, held_tokens: int) -> None:
        self._source, self._target, self._held = source, target, held_tokens

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        tokens = range(max(tokens.start, self._held), tokens.stop)
        if tokens:
            self._target.write_kv(request_id, layers, tokens, self._source.read_kv(request_id, layers, tokens))


@pytest.mark.parametrize("num_first", [1, 3])
@pytest.mark.parametrize("is_kept", [False, True], ids=["handed over", "kept"])
def test_a_hand_off_changes_nothing(
    num_first: int,
    is_kept: bool,
    runners: tuple[ModelRunner, ModelRunner],
    grammars: dict[Constraint, Grammar],
    alone: list[tuple[list[int], FinishReason]],
) -> None:
    """`num_first`: tokens that the decode side is told; more than one when it takes over later."""
    wanted = everything()
    source, target = engine(runners[0]), engine(runners[1])
    for one, (tokens, reason) in zip(wanted, alone, strict=True):
        held = target.reserve(one).held_tokens
        source.add_prefill(one, Copier(source, target, held))
        ((first, end),) = finish_prefill(source, one, grammars)
        assert first == tokens[:1]
        if end is not None:
            assert (first, end) == (tokens, reason)
            target.abort(one.request_id)
        elif is_kept:
            target.abort(one.request_id)
            source.keep(one.request_id)
            ((rest, last),) = finish_from(source, one, 1)
            assert (first + rest, last) == (tokens, reason)
        else:
            given = tokens[:num_first]
            if one.sampling.constraint is not None:
                target.supply(one.request_id, grammars[one.sampling.constraint])
            target.activate(one.request_id, given)
            ((rest, last),) = finish_from(target, one, len(given))
            assert (given + rest, last) == (tokens, reason)
            source.release(one.request_id)
        source.check()
        target.check()
    assert not source.request_ids
    assert not target.request_ids


def finish_prefill(
    source: Engine, one: GenerateRequest, grammars: dict[Constraint, Grammar]
) -> list[tuple[list[int], FinishReason | None]]:
    if one.sampling.constraint is not None:
        source.supply(one.request_id, grammars[one.sampling.constraint])
    for _ in range(100):
        for output in source.step():
            return [([token.token_id for token in output.tokens], output.finish.reason if output.finish else None)]
    raise AssertionError("no first token")


def finish_from(target: Engine, one: GenerateRequest, start: int) -> list[tuple[list[int], FinishReason]]:
    tokens: list[int] = []
    for _ in range(500):
        for output in target.step():
            assert [token.index - start for token in output.tokens] == [len(tokens)][: len(output.tokens)]
            tokens += [token.token_id for token in output.tokens]
            if output.finish is not None:
                return [(tokens, output.finish.reason)]
    raise AssertionError("no end")


def test_log_probabilities_are_of_what_is_allowed(
    runners: tuple[ModelRunner, ModelRunner], grammars: dict[Constraint, Grammar]
) -> None:
    one = request(ALL["choice"], logprobs=20, temperature=0.0)
    target = engine(runners[0])
    target.add(one)
    target.supply(one.request_id, grammars[ALL["choice"]])
    outputs = []
    while target.has_work():
        outputs += [token for output in target.step() for token in output.tokens]
    assert outputs
    for token in outputs:
        assert token.logprob is not None
        assert token.logprob <= 0
        assert 1 <= len(token.top_logprobs) <= 20
        assert all(alternative.logprob > float("-inf") for alternative in token.top_logprobs)
        assert token.token_id == token.top_logprobs[0].token_id
    assert len(outputs[-1].top_logprobs) < 20, "few tokens can follow in the middle of a choice"


def test_no_end_is_allowed_before_the_text_is_complete_and_a_complete_text_ends_before_min_tokens(
    runners: tuple[ModelRunner, ModelRunner], grammars: dict[Constraint, Grammar]
) -> None:
    biased = request(PERSON, logit_bias={EOS: 100.0}, seed=1)
    ignoring = request(PERSON, ignore_eos=True, seed=1)
    patient = request(REGEX, min_tokens=100, seed=1)
    stopping = request(REGEX, stop=("@",), seed=1)
    results = generate(engine(runners[0]), [biased, ignoring, patient, stopping], grammars)
    for one, (tokens, reason) in zip((biased, ignoring, patient), results[:3], strict=True):
        assert reason is FinishReason.STOP
        assert one.sampling.constraint is not None
        assert_valid(one.sampling.constraint, text_of(tokens))
    assert text_of(results[3][0]).endswith("@")


def test_a_text_that_may_end_or_go_on_ends_by_the_models_own_choice(
    runners: tuple[ModelRunner, ModelRunner], grammars: dict[Constraint, Grammar]
) -> None:
    """The end token is allowed where the text is complete, unless it is too early or ignored."""
    ends = request(WORDS, logit_bias={EOS: 100.0}, max_tokens=60, seed=5)
    later = request(WORDS, logit_bias={EOS: 100.0}, max_tokens=60, min_tokens=12, seed=5)
    never = request(WORDS, logit_bias={EOS: 100.0}, max_tokens=60, ignore_eos=True, seed=5)
    results = generate(engine(runners[0]), [ends, later, never], grammars)
    assert [reason for _, reason in results] == [FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH]
    assert results[0][0][-1] == EOS
    assert len(results[0][0]) == 2
    assert results[1][0][-1] == EOS
    assert len(results[1][0]) > 12
    assert EOS not in results[2][0]
    for tokens, _ in results:
        assert_valid(WORDS, text_of(tokens).rstrip(" "))


async def test_aborted_at_any_moment_nothing_is_left(
    runners: tuple[ModelRunner, ModelRunner], grammars: dict[Constraint, Grammar]
) -> None:
    target = engine(runners[0])
    for num_steps in range(6):
        one, mate = request(PERSON, seed=1), request(PERSON, seed=2)
        target.add(one)
        target.add(mate)
        if num_steps:
            target.supply(one.request_id, grammars[PERSON])
            target.supply(mate.request_id, grammars[PERSON])
        for _ in range(num_steps - 1):
            target.step()
        assert target.abort(one.request_id)
        target.supply(one.request_id, grammars[PERSON])  # too late: ignored
        target.check()
        if num_steps:
            ((_, reason),) = finish_from_any(target, mate)
            assert reason is FinishReason.STOP
        else:
            assert target.abort(mate.request_id)
    load = target.load_report()
    assert (load.num_running, load.num_waiting, load.free_blocks) == (0, 0, load.total_blocks)


def finish_from_any(target: Engine, one: GenerateRequest) -> list[tuple[int, FinishReason]]:
    num_tokens = 0
    for _ in range(500):
        for output in target.step():
            assert output.request_id == one.request_id
            num_tokens += len(output.tokens)
            if output.finish is not None:
                return [(num_tokens, output.finish.reason)]
    raise AssertionError("no end")


async def test_a_request_waits_for_its_grammar_and_others_pass(
    runners: tuple[ModelRunner, ModelRunner], grammars: dict[Constraint, Grammar]
) -> None:
    target = engine(runners[0])
    held, plain = request(PERSON), request(None, max_tokens=5)
    target.add(held)
    target.add(plain)
    assert target.load_report().num_waiting == 2
    tokens = [token for _ in range(10) for output in target.step() for token in output.tokens]
    assert len(tokens) == 5
    assert not target.has_work()
    assert target.load_report().num_waiting == 1
    ((_, reason),) = finish(target, [held], grammars)
    assert reason is FinishReason.STOP


async def test_a_grammar_whose_process_died_fails_its_requests_alone(runners: tuple[ModelRunner, ModelRunner]) -> None:
    async with library() as made:
        target = engine(runners[0])
        doomed, mate, plain = request(PERSON, seed=1), request(REGEX, seed=1), request(None, max_tokens=30)
        person, regex = await made.get(PERSON), await made.get(REGEX)
        for one in (doomed, mate, plain):
            target.add(one)
        target.supply(doomed.request_id, person)
        target.supply(mate.request_id, regex)
        target.step()
        target.step()
        person._kill()
        ends: dict[str, FinishReason] = {}
        failed = []
        while target.has_work():
            for output in target.step():
                if output.finish is not None:
                    ends[output.request_id] = output.finish.reason
            failed += target.take_failed()
        assert [request_id for request_id, _ in failed] == [doomed.request_id]
        assert failed[0][1].retryable
        assert ends == {mate.request_id: FinishReason.STOP, plain.request_id: FinishReason.LENGTH}
        again = await made.get(PERSON)
        assert again is not person
        target.add(request(PERSON, seed=1))
        target.supply(target.request_ids[0], again)
        while target.has_work():
            target.step()
        assert not target.take_failed()
