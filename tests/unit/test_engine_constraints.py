"""Constraints in an engine whose grammars answer late, never, or wrongly: no token is wrong, nobody else waits."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.clock import ManualClock
from core.ids import RequestId
from core.request import FinishReason, GenerateRequest, SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.masks import _forbid_there, forbid
from engine.sampler import Sampler, SamplingState
from grammar.wire import Status
from tests.fake_model import EOS, VOCAB_SIZE, FakeRunner, greedy, history_logits, reference_tokens
from tests.scripted_grammar import ScriptedGrammar, allowed

MAX_MODEL_LEN = 64


def reference(request: GenerateRequest) -> tuple[list[int], FinishReason]:
    """What any engine must generate under the scripted constraint, one token at a time, alone."""
    sampler = Sampler(VOCAB_SIZE)
    state = SamplingState(request.sampling, request.prompt_token_ids, (EOS,))
    tokens: list[int] = []
    while True:
        following = allowed(tuple(tokens)) - ({EOS} if EOS not in state.end_token_ids else set())
        if not following:
            return tokens, FinishReason.STOP
        if len(tokens) == request.sampling.max_tokens:
            return tokens, FinishReason.LENGTH
        bits = np.zeros(VOCAB_SIZE, np.bool_)
        bits[list(following)] = True
        logits = history_logits([*request.prompt_token_ids, *tokens])[None].clone()
        (token,) = sampler.choose(logits, [state], {0: np.packbits(bits, bitorder="little")}).token_ids
        assert token in following
        state.add(token)
        tokens.append(token)
        if token in state.end_token_ids:
            return tokens, FinishReason.STOP


def new_engine(clock: ManualClock | None = None, *, num_blocks: int = 16, max_batch_tokens: int = 7) -> Engine:
    """`mask_wait_s` is so short that what has not been answered before a step is late."""
    config = EngineConfig(
        block_size=4,
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        max_num_requests=4,
        mask_wait_s=1e-6,
        mask_timeout_s=2.0,
    )
    runner = FakeRunner(num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN)
    return Engine(runner, config, clock=clock or ManualClock())


@pytest.fixture
def scripted() -> Iterator[ScriptedGrammar]:
    made = ScriptedGrammar()
    yield made
    made.die()


def request(
    name: str, scripted: ScriptedGrammar | None, prompt: tuple[int, ...] = (1, 2, 3, 4, 5), **changes: object
) -> GenerateRequest:
    params: dict[str, object] = {"temperature": 1.0, "max_tokens": 12, "seed": len(name), **changes}
    constraint = scripted.constraint if scripted else None
    return GenerateRequest(RequestId(name), prompt, SamplingParams(constraint=constraint, **params))  # type: ignore[arg-type]


class Watch:
    """Steps an engine and keeps what came out."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.failed: dict[str, str] = {}

    def step(self) -> None:
        for output in self.engine.step():
            tokens = self.tokens.setdefault(output.request_id, [])
            for token in output.tokens:
                assert token.index == len(tokens)
                tokens.append(token.token_id)
            if output.finish is not None:
                assert output.request_id not in self.ends
                self.ends[output.request_id] = output.finish.reason
        for request_id, error in self.engine.take_failed():
            self.failed[request_id] = str(error)
        self.engine.check()

    def result(self, name: str) -> tuple[list[int], FinishReason]:
        return self.tokens[name], self.ends[name]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whenever_the_answers_come_no_token_is_wrong_and_nobody_else_waits(data: st.DataObject) -> None:
    """Several requests of two constraints and plain ones, in a pool too small for all; answers in any step."""
    grammars = ScriptedGrammar("a"), ScriptedGrammar("b")
    try:
        walk_schedules(data, grammars)
    finally:
        for scripted in grammars:
            scripted.die()


def walk_schedules(data: st.DataObject, grammars: tuple[ScriptedGrammar, ScriptedGrammar]) -> None:
    engine = new_engine(
        num_blocks=data.draw(st.sampled_from([9, 12, 16])), max_batch_tokens=data.draw(st.sampled_from([4, 7, 30]))
    )
    watch = Watch(engine)
    asked: dict[str, tuple[GenerateRequest, ScriptedGrammar | None]] = {}
    prompts = [tuple(range(9)), tuple(range(8)), (3, 1), (*range(9), 4, 4, 4)]
    for number in range(data.draw(st.integers(2, 6))):
        scripted = data.draw(st.sampled_from([*grammars, *grammars, None]))
        one = request(
            f"r{number}",
            scripted,
            data.draw(st.sampled_from(prompts)),
            seed=number,
            max_tokens=data.draw(st.sampled_from([1, 3, 9, 14])),
            temperature=data.draw(st.sampled_from([0.0, 1.0])),
            ignore_eos=data.draw(st.booleans()),
        )
        asked[str(one.request_id)] = one, scripted
        engine.add(one)
    unsupplied = [one for one, scripted in asked.values() if scripted]
    aborted: set[str] = set()
    plain_left = {name for name, (_, scripted) in asked.items() if scripted is None}
    for _ in range(600):
        action = data.draw(st.sampled_from(["step", "step", "step", "answer", "answer", "supply", "abort"]))
        match action:
            case "answer":
                data.draw(st.sampled_from(grammars)).answer(data.draw(st.sampled_from([1, 2, None])))
            case "supply" if unsupplied:
                one = unsupplied.pop(0)
                scripted = asked[one.request_id][1]
                assert scripted is not None
                engine.supply(one.request_id, scripted.grammar)
            case "abort" if len(aborted) < 1 and data.draw(st.integers(0, 9)) == 0:
                name = data.draw(st.sampled_from(sorted(asked)))
                if engine.abort(RequestId(name)):
                    aborted.add(name)
            case _:
                watch.step()
        if not engine.request_ids:
            break
    for one in unsupplied:
        scripted = asked[one.request_id][1]
        assert scripted is not None
        engine.supply(one.request_id, scripted.grammar)
    for _ in range(2000):
        if not engine.request_ids:
            break
        for scripted in grammars:
            scripted.answer()
        watch.step()
    assert not watch.failed
    for name, (one, scripted) in asked.items():
        if name in aborted:
            continue
        if scripted is None:
            assert watch.result(name)[0] == reference_tokens(one, max_model_len=MAX_MODEL_LEN)
        else:
            tokens, reason = reference(one)
            # The answer to the last token that fits may be late: then the text is cut, as far as anybody knows.
            assert watch.tokens.get(name, []) == tokens
            assert watch.ends[name] is reason or (reason, len(tokens)) == (FinishReason.STOP, one.sampling.max_tokens)
    assert plain_left <= watch.ends.keys() | aborted
    for scripted in grammars:
        assert scripted.num_open == 0
    load = engine.load_report()
    assert load.free_blocks == load.total_blocks


def test_a_late_answer_costs_its_own_request_steps_and_no_other(scripted: ScriptedGrammar) -> None:
    watch = Watch(new_engine())
    slow, plain = request("slow", scripted), request("plain", None, max_tokens=9, ignore_eos=True)
    watch.engine.add(slow)
    watch.engine.add(plain)
    watch.engine.supply(slow.request_id, scripted.grammar)
    scripted.answer()
    for _ in range(12):  # nothing is answered after the first mask
        watch.step()
    assert len(watch.tokens["slow"]) == 1
    assert watch.ends == {"plain": FinishReason.LENGTH}
    while "slow" not in watch.ends:
        scripted.answer()
        watch.step()
    assert watch.result("slow") == reference(slow)


def test_an_answer_that_does_not_come_fails_its_constraint_alone(scripted: ScriptedGrammar) -> None:
    clock = ManualClock()
    other = ScriptedGrammar("other")
    watch = Watch(new_engine(clock))
    slow, mate = request("slow", scripted), request("mate", other)
    for one, its in ((slow, scripted), (mate, other)):
        watch.engine.add(one)
        watch.engine.supply(one.request_id, its.grammar)
        its.answer()
    scripted.grammar.clock = clock
    watch.step()
    clock.advance(1.9)
    watch.step()
    assert not watch.failed
    clock.advance(0.2)
    while "mate" not in watch.ends:
        other.answer()
        watch.step()
    assert watch.result("mate") == reference(mate)
    assert "takes more than 2 s" in watch.failed["slow"]
    assert scripted.is_killed
    assert not watch.engine.request_ids
    other.die()


ANSWERS: Mapping[Status, str] = {Status.STUCK: "no token can follow", Status.REFUSED: "does not fit"}


@pytest.mark.parametrize("status", ANSWERS)
def test_what_cannot_go_on_fails_alone(scripted: ScriptedGrammar, status: Status) -> None:
    watch = Watch(new_engine())
    bad, good, plain = request("bad", scripted), request("good", scripted, seed=9), request("plain", None, seed=2)
    for one in (bad, good, plain):
        watch.engine.add(one)
    watch.engine.supply(bad.request_id, scripted.grammar)
    scripted.say(status)
    watch.engine.supply(good.request_id, scripted.grammar)
    while len(watch.ends) < 2:
        scripted.answer()
        watch.step()
    assert ANSWERS[status] in watch.failed["bad"]
    assert watch.result("good") == reference(good)
    assert watch.tokens["plain"] == reference_tokens(plain)


def test_a_process_that_dies_fails_its_requests_wherever_they_are(scripted: ScriptedGrammar) -> None:
    watch = Watch(new_engine())
    names = ["running", "waiting", "unready"]
    for name in names:
        watch.engine.add(request(name, scripted))
    watch.engine.supply(RequestId("running"), scripted.grammar)
    scripted.answer()
    watch.step()
    watch.engine.supply(RequestId("waiting"), scripted.grammar)
    scripted.die()
    watch.step()
    watch.step()
    assert {*watch.failed} == {"running", "waiting"}
    watch.engine.supply(RequestId("unready"), scripted.grammar)
    watch.step()
    assert {*watch.failed} == {*names}
    assert not watch.engine.request_ids


def test_min_tokens_gives_way_where_only_an_end_may_follow() -> None:
    sampler = Sampler(VOCAB_SIZE)
    params = greedy(9, min_tokens=5, stop_token_ids=(7,))
    state = SamplingState(params, (1,), (EOS,))
    bits = np.zeros(VOCAB_SIZE, np.bool_)
    bits[[7, EOS]] = True
    only_ends = np.packbits(bits, bitorder="little")
    bits[[11, 12]] = True
    more = np.packbits(bits, bitorder="little")
    logits = history_logits([1])[None]
    assert sampler.choose(logits.clone(), [state], {0: only_ends}).token_ids[0] in (7, EOS)
    assert sampler.choose(logits.clone(), [state], {0: more}).token_ids[0] in (11, 12)


def test_a_masked_row_changes_no_other_row() -> None:
    sampler = Sampler(VOCAB_SIZE)
    states = [SamplingState(SamplingParams(seed=seed, logprobs=3), (1,), (EOS,)) for seed in range(4)]
    logits = np.stack([history_logits([seed]).numpy() for seed in range(4)])
    plain = sampler.choose(torch.from_numpy(logits.copy()), states)
    bits = np.zeros(VOCAB_SIZE, np.bool_)
    bits[[3, 50]] = True
    masked = sampler.choose(torch.from_numpy(logits.copy()), states, {2: np.packbits(bits, bitorder="little")})
    for row in (0, 1, 3):
        assert plain.token_ids[row] == masked.token_ids[row]
        assert plain.details[row] == masked.details[row]
    assert masked.token_ids[2] in (3, 50)
    assert {one.token_id for one in masked.details[2].top_logprobs} == {3, 50}


@pytest.mark.parametrize("vocab_size", [31, 97, 4096])
def test_masks_mean_the_same_on_every_device(vocab_size: int) -> None:
    """The way of other devices, on this one: rows in any order, more bits than tokens, other rows untouched."""
    dice = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(dice.normal(size=(5, vocab_size)).astype(np.float32))
    masks = {row: dice.integers(0, 256, vocab_size // 8 + 5, dtype=np.uint8) for row in (3, 0, 2)}
    here, there = logits.clone(), logits.clone()
    forbid(here, masks)
    _forbid_there(there, masks)
    assert torch.equal(here, there)
    assert torch.equal(here[[1, 4]], logits[[1, 4]])
    for row, mask in masks.items():
        kept = [token for token in range(vocab_size) if mask[token // 8] >> token % 8 & 1]
        assert (here[row] > -torch.inf).nonzero().flatten().tolist() == kept
