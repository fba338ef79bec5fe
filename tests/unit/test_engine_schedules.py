"""Random schedules of everything that can happen to an engine: no block is lost or shared, no token is wrong.

The model remembers (`tests.fake_model`): a token is right only if every position before it was read from the right
block. After every action the engine's books are checked, and a mirror fed with its cache events must equal its cache.
"""

from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.errors import PromptTooLong, RejectedError, TransferError
from core.ids import RequestId
from core.kv_events import BlocksRemoved, BlocksStored, CacheCleared
from core.request import GenerateRequest, RequestOutput, SamplingParams
from engine.contract import StepFailed
from tests.fake_model import NUM_LAYERS, FakeRunner, fake_engine, reference_tokens

LAYERS = range(NUM_LAYERS)
MAX_MODEL_LEN = 40
# Few beginnings, so that prompts share prefixes.
PROMPTS = st.builds(
    lambda base, length, tail: (*base[:length], *tail),
    st.sampled_from([tuple(range(20)), tuple(range(10)) * 2, (7,) * 20]),
    st.sampled_from([1, 3, 4, 8, 8, 11, 12, 16, 19]),
    st.sampled_from([(), (), (5,), (6, 7, 8)]),
)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 3),
    max_tokens=st.sampled_from([1, 2, 9, 25]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    ignore_eos=st.booleans(),
)
WHICH = st.integers(0, 1000)


@lru_cache(100_000)
def expected_tokens(
    prompt: tuple[int, ...], seed: int, temperature: float, max_tokens: int, repetition: float, ignore_eos: bool
) -> list[int]:
    params = SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, repetition_penalty=repetition, ignore_eos=ignore_eos
    )
    return reference_tokens(GenerateRequest(RequestId("r"), prompt, params), max_model_len=MAX_MODEL_LEN)


def expected(request: GenerateRequest) -> list[int]:
    params = request.sampling
    return expected_tokens(
        request.prompt_token_ids,
        params.seed,
        params.temperature,
        params.max_tokens,
        params.repetition_penalty,
        params.ignore_eos,
    )


def frame_of(prompt: tuple[int, ...], tokens: range) -> torch.Tensor:
    """The KV that the model computes for these positions."""
    pairs = torch.tensor([(prompt[at], at) for at in tokens], dtype=torch.float32)
    return pairs.expand(NUM_LAYERS, 2, 1, len(tokens), 2).contiguous()


class Schedules(RuleBasedStateMachine):
    """One engine; requests by what became of them."""

    @initialize(
        num_blocks=st.sampled_from([9, 11, 16]),
        max_batch_tokens=st.sampled_from([4, 7, 30]),
        max_cached_blocks=st.sampled_from([5, 16]),
    )
    def start(self, num_blocks: int, max_batch_tokens: int, max_cached_blocks: int) -> None:
        self.engine = fake_engine(
            num_blocks=num_blocks,
            block_size=4,
            max_batch_tokens=max_batch_tokens,
            max_num_requests=4,
            max_num_waiting=3,
            max_cached_blocks=max_cached_blocks,
            max_model_len=MAX_MODEL_LEN,
        )
        runner = self.engine._executor._runner
        assert isinstance(runner, FakeRunner)
        self.runner = runner
        self.count = 0
        self.requests: dict[RequestId, GenerateRequest] = {}
        self.tokens: dict[RequestId, list[int]] = {}
        self.running: list[RequestId] = []
        self.prefills: list[RequestId] = []
        self.leased: list[RequestId] = []
        self.reserved: list[RequestId] = []
        self.written: dict[RequestId, int] = {}
        self.ready: dict[RequestId, int] = {}
        self.mirror: set[bytes] = set()

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        if layers.stop == NUM_LAYERS:
            assert tokens.start == self.ready.get(request_id, 0)
            self.ready[request_id] = tokens.stop
        prompt = self.requests[request_id].prompt_token_ids
        frame = self.engine.read_kv(request_id, layers, tokens)
        assert torch.equal(frame, frame_of(prompt, tokens)[layers.start : layers.stop])

    def new(self, prompt: tuple[int, ...], params: SamplingParams) -> GenerateRequest:
        self.count += 1
        request = GenerateRequest(RequestId(f"r{self.count}"), prompt, params)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []
        return request

    @rule(prompt=PROMPTS, params=PARAMS, is_prefill=st.booleans())
    def add(self, prompt: tuple[int, ...], params: SamplingParams, is_prefill: bool) -> None:
        request = self.new(prompt, params)
        try:
            if is_prefill:
                self.engine.add_prefill(request, self)
            else:
                self.engine.add(request)
        except (RejectedError, PromptTooLong):
            assert request.request_id not in self.engine.request_ids
        else:
            (self.prefills if is_prefill else self.running).append(request.request_id)

    @rule(prompt=PROMPTS, params=PARAMS)
    def reserve(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        request = self.new(prompt, params)
        try:
            held = self.engine.reserve(request).held_tokens
        except (RejectedError, PromptTooLong):
            assert request.request_id not in self.engine.request_ids
        else:
            assert held <= len(prompt)
            self.reserved.append(request.request_id)
            self.written[request.request_id] = held

    @precondition(lambda self: self.reserved)
    @rule(which=WHICH, count=st.integers(1, 25))
    def write(self, which: int, count: int) -> None:
        request_id = self.reserved[which % len(self.reserved)]
        prompt = self.requests[request_id].prompt_token_ids
        start = self.written[request_id]
        tokens = range(start, min(start + count, len(prompt)))
        if tokens:
            self.engine.write_kv(request_id, LAYERS, tokens, frame_of(prompt, tokens))
            self.written[request_id] = tokens.stop

    @precondition(lambda self: self.reserved)
    @rule(which=WHICH, count=st.sampled_from([1, 1, 1, 3, 30]), exact=st.booleans())
    def activate(self, which: int, count: int, exact: bool) -> None:
        request_id = self.reserved[which % len(self.reserved)]
        first = expected(self.requests[request_id])[:count]
        if self.written[request_id] < self.requests[request_id].num_prompt_tokens:
            with pytest.raises(TransferError):
                self.engine.activate(request_id, first, exact=exact)
            return
        self.engine.activate(request_id, first, exact=exact)
        self.tokens[request_id] = list(first)
        self.reserved.remove(request_id)
        self.running.append(request_id)

    @rule()
    def step(self) -> None:
        for output in self.engine.step():
            self.take(output)

    def take(self, output: RequestOutput) -> None:
        request_id = output.request_id
        tokens = self.tokens[request_id]
        for token in output.tokens:
            assert token.index == len(tokens)
            tokens.append(token.token_id)
        right = expected(self.requests[request_id])
        assert tokens == right[: len(tokens)]
        group = self.prefills if request_id in self.prefills else self.running
        if output.finish is not None:
            assert len(tokens) == len(right)
            group.remove(request_id)
        elif group is self.prefills:
            assert self.ready[request_id] == self.requests[request_id].num_prompt_tokens
            group.remove(request_id)
            self.leased.append(request_id)
        else:
            assert len(tokens) < len(right)

    @precondition(lambda self: self.running or self.prefills)
    @rule()
    def fail(self) -> None:
        self.runner.fail_next = RuntimeError("broken")
        try:
            for output in self.engine.step():
                self.take(output)
        except StepFailed as error:
            for request_id in error.request_ids:
                assert self.engine.abort(request_id)
                (self.prefills if request_id in self.prefills else self.running).remove(request_id)
        self.runner.fail_next = None

    @rule(which=WHICH)
    def abort(self, which: int) -> None:
        groups = [self.running, self.prefills, self.leased, self.reserved]
        everything = [(group, request_id) for group in groups for request_id in group]
        if everything:
            group, request_id = everything[which % len(everything)]
            assert self.engine.abort(request_id)
            assert not self.engine.abort(request_id)
            group.remove(request_id)

    @precondition(lambda self: self.leased)
    @rule(which=WHICH, start=st.integers(0, 25))
    def read(self, which: int, start: int) -> None:
        request_id = self.leased[which % len(self.leased)]
        prompt = self.requests[request_id].prompt_token_ids
        tokens = range(start % len(prompt), len(prompt))
        assert torch.equal(self.engine.read_kv(request_id, LAYERS, tokens), frame_of(prompt, tokens))

    @precondition(lambda self: self.leased)
    @rule(which=WHICH)
    def release(self, which: int) -> None:
        self.engine.release(self.leased.pop(which % len(self.leased)))

    @precondition(lambda self: self.leased or self.prefills)
    @rule(which=WHICH)
    def keep(self, which: int) -> None:
        everything = [(group, request_id) for group in (self.leased, self.prefills) for request_id in group]
        group, request_id = everything[which % len(everything)]
        request = self.requests[request_id]
        num_tokens = min(request.num_prompt_tokens + request.sampling.max_tokens, MAX_MODEL_LEN) - 1
        if num_tokens > self.engine.load_report().total_blocks * 4:
            with pytest.raises(RejectedError, match="too_long"):
                self.engine.keep(request_id)
            return
        self.engine.keep(request_id)
        group.remove(request_id)
        self.running.append(request_id)

    @rule()
    def drop_cache(self) -> None:
        self.engine._ledger.cache.evict(self.engine.load_report().total_blocks)

    @invariant()
    def books_agree(self) -> None:
        self.engine.check()
        held = {*self.running, *self.prefills, *self.leased, *self.reserved}
        assert held >= set(self.engine.request_ids)
        for event in self.engine.take_kv_events():
            match event:
                case BlocksStored(_, hashes):
                    assert not self.mirror & set(hashes)
                    self.mirror |= set(hashes)
                case BlocksRemoved(hashes):
                    assert self.mirror >= set(hashes)
                    self.mirror -= set(hashes)
                case CacheCleared():
                    self.mirror.clear()
        chains = self.engine.snapshot_cache()
        assert self.mirror == {digest for chain in chains for digest in chain.hashes}

    def teardown(self) -> None:
        for request_id in self.reserved:
            assert self.engine.abort(request_id)
        for _ in range(2000):
            for request_id in self.leased:
                self.engine.release(request_id)
            self.leased.clear()
            if not self.engine.has_work():
                break
            self.step()
            self.engine.check()
        assert not self.running
        assert not self.prefills
        assert not self.engine.request_ids
        load = self.engine.load_report()
        assert load.free_blocks == load.total_blocks
        self.drop_cache()
        assert self.engine.load_report().cached_blocks == 0
        self.engine.check()


COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=40)
Schedules.TestCase.settings = settings(COMMON, max_examples=60)
TestSomeSchedules = Schedules.TestCase


class ManySchedules(Schedules):
    """The same, more often."""


ManySchedules.TestCase.settings = settings(COMMON, max_examples=1000)
TestManySchedules = pytest.mark.slow(ManySchedules.TestCase)
