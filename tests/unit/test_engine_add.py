"""One engine alone: batching, chunks, preemption, abort, limits, prefix cache, over a model that remembers."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from core.errors import DuplicateRequest, InvalidRequest, PromptTooLong, RejectedError, RejectReason
from core.ids import RequestId
from core.kv_events import BlocksStored
from core.request import Finish, FinishReason, GenerateRequest, SamplingParams
from engine.contract import NoFiniteLogits, StepFailed
from engine.engine import Engine
from engine.scheduler import Admission
from tests.fake_model import EOS, FakeRunner, fake_engine, greedy, reference_tokens, run_to_end, token_ids


def request(
    name: str, prompt: Sequence[int], params: SamplingParams | None = None, tenant: str = ""
) -> GenerateRequest:
    return GenerateRequest(RequestId(name), tuple(prompt), params or greedy(), tenant=tenant)


def runner_of(engine: Engine) -> FakeRunner:
    runner = engine._executor._runner
    assert isinstance(runner, FakeRunner)
    return runner


@pytest.mark.parametrize("max_batch_tokens", [1, 3, 16, 100])
def test_outputs_do_not_depend_on_the_chunk_size(max_batch_tokens: int) -> None:
    engine = fake_engine(num_blocks=64, max_batch_tokens=max_batch_tokens)
    requests = [
        request("greedy", range(10, 33)),
        request("one", [5], greedy(max_tokens=1)),
        request("seeded", range(20, 29), SamplingParams(seed=5, max_tokens=12, top_k=20, repetition_penalty=1.1)),
        request("penalties", [3] * 9, SamplingParams(seed=9, max_tokens=20, frequency_penalty=0.7)),
    ]
    for one in requests:
        assert engine.add(one) == 0
    outputs = run_to_end(engine)
    for one in requests:
        assert token_ids(outputs[one.request_id]) == reference_tokens(one)
    assert engine.load_report().free_blocks == 64


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    engine = fake_engine(num_blocks=64, max_batch_tokens=4)
    engine.add(request("short", [1, 2], greedy(max_tokens=20, ignore_eos=True)))
    engine.step()
    engine.add(request("long", range(30)))
    for _ in range(9):
        assert [output.request_id for output in engine.step()] == ["short"]
        assert engine.last_step.num_prompt_tokens == 3
    assert runner_of(engine).batch_sizes[-1] == (1, 3)


def test_a_prefix_hit_gives_the_same_tokens_and_computes_less() -> None:
    engine = fake_engine()
    prompt = list(range(40, 59))  # 4 full blocks and 3 tokens
    engine.add(request("cold", prompt))
    cold = token_ids(run_to_end(engine)["cold"])
    assert engine.add(request("warm", prompt)) == 16
    engine.step()
    assert engine.last_step.admitted == (Admission(RequestId("warm"), 16),)
    assert runner_of(engine).batch_sizes[-1] == (3,)
    engine.abort(RequestId("warm"))
    assert engine.add(request("again", prompt)) == 16
    assert token_ids(run_to_end(engine)["again"]) == cold == reference_tokens(request("cold", prompt))


def test_a_full_hit_computes_the_last_block_into_a_block_of_its_own() -> None:
    engine = fake_engine()
    prompt = list(range(40, 56))  # exactly 4 blocks
    for name, cached in (("cold", 0), ("warm", 12), ("third", 12)):
        assert engine.add(request(name, prompt)) == cached
        assert token_ids(run_to_end(engine)[name]) == reference_tokens(request("cold", prompt))


def test_generated_blocks_are_cached_too() -> None:
    engine = fake_engine()
    first = request("first", range(6), greedy(max_tokens=7, ignore_eos=True))
    engine.add(first)
    generated = token_ids(run_to_end(engine)["first"])
    assert engine.add(request("next-turn", [*range(6), *generated, 1, 2])) == 12


def test_tenants_do_not_share() -> None:
    engine = fake_engine()
    engine.add(request("a", range(12), tenant="x"))
    run_to_end(engine)
    assert engine.add(request("b", range(12), tenant="y")) == 0
    assert engine.add(request("c", range(12), tenant="x")) == 8


def test_tenants_with_one_salt_share_with_each_other_alone() -> None:
    engine = fake_engine()
    engine.add(replace(request("a", range(12), tenant="x"), shared_salt="group g"))
    run_to_end(engine)
    assert engine.add(replace(request("b", range(12), tenant="y"), shared_salt="group g")) == 8
    assert engine.add(request("c", range(12), tenant="x")) == 0


def test_hashes_given_with_the_request_are_used() -> None:
    engine = fake_engine()
    one = request("a", range(12))
    engine.add(one)
    run_to_end(engine)
    (chain,) = [event for event in engine.take_kv_events() if isinstance(event, BlocksStored)]
    other = GenerateRequest(RequestId("b"), tuple(range(12)), greedy(), block_hashes=chain.hashes[:3])
    assert engine.add(other) == 8


def test_without_the_cache_nothing_is_kept() -> None:
    engine = fake_engine(prefix_cache=False)
    engine.add(request("a", range(12)))
    run_to_end(engine)
    assert engine.add(request("b", range(12))) == 0
    assert not engine.take_kv_events()


def test_preemption_recomputes_the_youngest() -> None:
    engine = fake_engine(num_blocks=8, prefix_cache=False)
    requests = [request(name, [at] * 6, greedy(max_tokens=18, ignore_eos=True)) for at, name in enumerate("abc")]
    for one in requests:
        engine.add(one)
    preempted = 0
    order: list[str] = []
    outputs: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
            if output.finish is not None:
                order.append(output.request_id)
        preempted += engine.last_step.num_preempted
        engine.check()
    assert preempted > 0
    assert order == ["a", "b", "c"]
    for one in requests:
        assert outputs[one.request_id] == reference_tokens(one)


def test_preemption_does_not_change_seeded_samples() -> None:
    params = [SamplingParams(seed=seed, max_tokens=18, ignore_eos=True, presence_penalty=0.5) for seed in range(4)]
    requests = [request(f"r{at}", [at] * 5, one) for at, one in enumerate(params)]
    engine = fake_engine(num_blocks=9)
    for one in requests:
        engine.add(one)
    outputs = run_to_end(engine)
    for one in requests:
        assert token_ids(outputs[one.request_id]) == reference_tokens(one)


def test_first_come_first_served() -> None:
    """A short request does not overtake a long one that waits for blocks."""
    engine = fake_engine(num_blocks=8)
    engine.add(request("running", range(20), greedy(max_tokens=6, ignore_eos=True)))
    engine.step()
    engine.step()
    engine.add(request("long", range(50, 74), greedy(max_tokens=2)))
    engine.add(request("short", [1], greedy(max_tokens=2)))
    assert list(run_to_end(engine)) == ["running", "long", "short"]


def test_end_of_sequence_ends_unless_ignored() -> None:
    prompt = next([at] for at in range(90) if EOS in reference_tokens(request("r", [at], greedy(max_tokens=60))))
    engine = fake_engine()
    engine.add(request("r", prompt, greedy(max_tokens=60)))
    engine.add(request("on", prompt, greedy(max_tokens=60, ignore_eos=True)))
    outputs = run_to_end(engine)
    assert outputs["r"][-1].finish == Finish(FinishReason.STOP, EOS)
    assert token_ids(outputs["r"])[-1] == EOS
    assert outputs["on"][-1].finish == Finish(FinishReason.LENGTH)
    assert len(token_ids(outputs["on"])) == 60


def test_min_tokens_holds_the_end_back() -> None:
    prompt = next([at] for at in range(90) if EOS in reference_tokens(request("r", [at], greedy(max_tokens=10))))
    params = greedy(max_tokens=20, min_tokens=15)
    engine = fake_engine()
    engine.add(request("r", prompt, params))
    tokens = token_ids(run_to_end(engine)["r"])
    assert EOS not in tokens[:15]
    assert tokens == reference_tokens(request("r", prompt, params))


def test_a_full_context_ends_with_length() -> None:
    engine = fake_engine(max_model_len=20)
    engine.add(request("r", range(15), greedy(max_tokens=100, ignore_eos=True)))
    outputs = run_to_end(engine)["r"]
    assert len(token_ids(outputs)) == 5
    assert outputs[-1].finish == Finish(FinishReason.LENGTH)


def test_stop_strings() -> None:
    def decode(token_ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in token_ids)

    plain = reference_tokens(request("r", [4, 2]))
    stop = f"{plain[3]}><{plain[4]}"
    engine = fake_engine(decode=decode)
    engine.add(request("r", [4, 2], greedy(stop=(stop,))))
    outputs = run_to_end(engine)["r"]
    assert token_ids(outputs) == plain[:5]
    assert outputs[-1].finish == Finish(FinishReason.STOP, stop)


def test_logprobs_come_with_the_tokens() -> None:
    engine = fake_engine()
    engine.add(request("with", [4, 2], greedy(logprobs=2)))
    engine.add(request("without", [4, 2]))
    outputs = run_to_end(engine)
    for output in outputs["with"]:
        (token,) = output.tokens
        assert token.logprob == token.top_logprobs[0].logprob > token.top_logprobs[1].logprob
        assert token.token_id == token.top_logprobs[0].token_id
    assert all(token.logprob is None for output in outputs["without"] for token in output.tokens)


@pytest.mark.parametrize(
    ("bad", "error", "field"),
    [
        (request("r", []), InvalidRequest, "prompt_token_ids"),
        (request("r", [97]), InvalidRequest, "prompt_token_ids"),
        (request("r", [-1]), InvalidRequest, "prompt_token_ids"),
        (request("r", [1], SamplingParams(temperature=-1)), InvalidRequest, "sampling.temperature"),
        (request("r", [1], SamplingParams(stop=("x",))), InvalidRequest, "sampling.stop"),
        (request("r", [1] * 64), PromptTooLong, "prompt_token_ids"),
        (request("r", [1] * 20, greedy(max_tokens=30)), PromptTooLong, "prompt_token_ids"),
    ],
    ids=["empty", "vocabulary", "negative", "sampling", "no-tokenizer", "context", "pool"],
)
def test_what_can_never_work_is_refused(bad: GenerateRequest, error: type[InvalidRequest], field: str) -> None:
    engine = fake_engine(num_blocks=8)
    with pytest.raises(error) as caught:
        engine.add(bad)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert not engine.has_work()
    engine.check()


def test_a_request_that_just_fits_runs_alone() -> None:
    engine = fake_engine(num_blocks=8)
    engine.add(request("r", range(20), greedy(max_tokens=13, ignore_eos=True)))
    assert len(token_ids(run_to_end(engine)["r"])) == 13


def test_duplicates_and_a_full_queue_are_refused() -> None:
    engine = fake_engine(max_num_waiting=2)
    engine.add(request("a", [1]))
    with pytest.raises(DuplicateRequest):
        engine.add(request("a", [2]))
    engine.add(request("b", [1]))
    with pytest.raises(RejectedError) as caught:
        engine.add(request("c", [1]))
    assert caught.value.reason is RejectReason.QUEUE_FULL
    engine.step()
    engine.add(request("c", [1]))
    assert set(run_to_end(engine)) == {"a", "b", "c"}


def test_abort_at_any_point_frees_everything() -> None:
    for steps in range(12):
        engine = fake_engine(num_blocks=12, max_batch_tokens=4)
        engine.add(request("a", range(10)))
        engine.add(request("b", range(50, 60)))
        for _ in range(steps):
            engine.step()
        was_there = "a" in engine.request_ids
        assert engine.abort(RequestId("a")) is was_there
        assert engine.abort(RequestId("a")) is False
        engine.check()
        outputs = run_to_end(engine)
        assert "a" not in outputs
        assert engine.load_report().free_blocks == 12


def test_a_failed_step_changes_nothing_and_names_its_requests() -> None:
    engine = fake_engine()
    engine.add(request("a", range(10)))
    engine.step()
    engine.add(request("b", [1, 2]))
    runner_of(engine).fail_next = RuntimeError("out of memory\nmore")
    with pytest.raises(StepFailed, match=r"engine step failed: RuntimeError: out of memory$") as caught:
        engine.step()
    assert caught.value.request_ids == ("a", "b")
    engine.check()
    outputs = run_to_end(engine)  # the cause is gone, so they could even go on
    assert token_ids(outputs["b"]) == reference_tokens(request("b", [1, 2]))
    assert token_ids(outputs["a"]) == reference_tokens(request("a", range(10)))[1:]


def test_logits_that_are_not_numbers_end_their_request_only() -> None:
    engine = fake_engine(max_batch_tokens=64)
    runner_of(engine).poison = 77
    engine.add(request("good", range(10)))
    engine.add(request("bad", [1, 2, 3, 4, 77]))
    engine.add(request("later", [5, 6]))
    outputs = engine.step()
    assert [output.request_id for output in outputs] == ["good", "later"]
    ((failed, error),) = engine.take_failed()
    assert failed == "bad"
    assert isinstance(error, NoFiniteLogits)
    assert engine.take_failed() == []
    engine.check()
    assert engine.request_ids == ("good", "later")
    assert len(engine.snapshot_cache()) == 1, "what it computed must not be shared"
    assert token_ids(run_to_end(engine)["good"]) == reference_tokens(request("good", range(10)))[1:]


def test_load_report_counts() -> None:
    engine = fake_engine(num_blocks=32, max_batch_tokens=4, max_num_requests=2)
    engine.add(request("a", range(10)))
    engine.add(request("b", range(20, 26)))
    engine.step()
    load = engine.load_report()
    assert (load.num_running, load.num_waiting, load.queued_prefill_tokens) == (1, 1, 6 + 6)
    assert (load.context_tokens, load.total_blocks, load.cached_blocks, load.free_blocks) == (4, 32, 1, 29)


def test_a_cached_block_is_not_counted_as_free_for_the_request_that_uses_it() -> None:
    engine = fake_engine(num_blocks=8)
    engine.add(request("first", range(16), greedy(max_tokens=1)))
    run_to_end(engine)
    engine.add(request("other", range(50, 57), greedy(max_tokens=9, ignore_eos=True)))
    engine.step()
    # Free: 8 - 2 = 6, of which 4 are cached and used by the next; it needs 3 more, 2 are there.
    engine.add(request("second", [*range(16), *range(30, 40)], greedy(max_tokens=1)))
    engine.step()
    assert engine.last_step.num_decodes == 1
    assert not engine.last_step.admitted
    engine.check()
    assert token_ids(run_to_end(engine)["second"]) == reference_tokens(
        request("second", [*range(16), *range(30, 40)], greedy(max_tokens=1))
    )
