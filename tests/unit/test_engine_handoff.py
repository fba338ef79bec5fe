"""Two engines with a hand-off between them, over a model that remembers; leases, reservations, quarantine."""

import threading
from collections.abc import Sequence

import pytest
import torch

from core.errors import DuplicateRequest, PromptTooLong, RejectedError, RejectReason, TransferError
from core.ids import RequestId
from core.request import Finish, FinishReason, GenerateRequest, RequestOutput, SamplingParams
from engine.engine import Engine
from engine.handoff import NoSuchHandoff
from engine.pool import KvPool
from tests.fake_model import NUM_LAYERS, VOCAB_SIZE, fake_engine, greedy, reference_tokens, run_to_end, token_ids

LAYERS = range(NUM_LAYERS)
SHORT_S = 5.0


class Recorder:
    """Notes what is ready, and may copy it over at once."""

    def __init__(self, source: Engine, target: Engine | None = None, held_tokens: int = 0) -> None:
        self.ready: list[tuple[range, range]] = []
        self._source, self._target, self._held = source, target, held_tokens

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        self.ready.append((layers, tokens))
        tokens = range(max(tokens.start, self._held), tokens.stop)
        if self._target is not None and tokens:
            self._target.write_kv(request_id, layers, tokens, self._source.read_kv(request_id, layers, tokens))


def request(name: str, prompt: Sequence[int], params: SamplingParams | None = None) -> GenerateRequest:
    return GenerateRequest(RequestId(name), tuple(prompt), params or greedy())


def hand_over(source: Engine, target: Engine, one: GenerateRequest, *, exact: bool = True) -> list[RequestOutput]:
    """Run `one` on two engines; return all its outputs."""
    held = target.reserve(one).held_tokens
    source.add_prefill(one, Recorder(source, target, held))
    first = run_to_end(source)[one.request_id]
    if first[-1].finish is not None:
        target.abort(one.request_id)
        return first
    source.release(one.request_id)
    target.activate(one.request_id, token_ids(first), exact=exact)
    target.check()
    return first + run_to_end(target).get(one.request_id, [])


@pytest.mark.parametrize("chunk", [3, 16, 64])
@pytest.mark.parametrize("block_sizes", [(4, 4), (4, 8), (8, 3)], ids=str)
@pytest.mark.parametrize(
    "params",
    [
        greedy(12),
        SamplingParams(seed=3, max_tokens=20, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.4),
        SamplingParams(seed=4, max_tokens=20, min_tokens=9, top_p=0.8, logprobs=1),
        greedy(1),
    ],
    ids=["greedy", "penalties", "min-tokens", "one-token"],
)
def test_two_engines_generate_what_one_does(params: SamplingParams, block_sizes: tuple[int, int], chunk: int) -> None:
    source = fake_engine(block_size=block_sizes[0], max_batch_tokens=chunk)
    target = fake_engine(block_size=block_sizes[1], max_batch_tokens=chunk)
    for name, prompt in (("cold", range(19)), ("prefix-hit", [*range(17), 50, 51]), ("full-hit", range(16))):
        one = request(name, prompt, params)
        outputs = hand_over(source, target, one)
        assert token_ids(outputs) == reference_tokens(one)
        assert outputs[-1].finish is not None
    for engine in (source, target):
        assert engine.load_report().free_blocks == 32


def test_readiness_covers_every_layer_of_every_position_once() -> None:
    engine = fake_engine(max_batch_tokens=5)
    recorder = Recorder(engine)
    one = request("a", range(18))
    assert engine.add_prefill(one, recorder) == 0
    run_to_end(engine)
    assert recorder.ready[:3] == [(range(2), range(5)), (range(2, 3), range(5)), (range(2), range(5, 10))]
    seen = [(layer, token) for layers, tokens in recorder.ready for layer in layers for token in tokens]
    assert sorted(seen) == [(layer, token) for layer in LAYERS for token in range(18)]
    engine.release(one.request_id)
    warm = Recorder(engine)
    engine.add_prefill(request("b", range(18)), warm)
    run_to_end(engine)
    assert warm.ready == [(LAYERS, range(16)), (range(2), range(16, 18)), (range(2, 3), range(16, 18))]


def test_a_lease_keeps_its_blocks_until_released() -> None:
    engine = fake_engine(num_blocks=8)
    one = request("a", range(18))
    engine.add_prefill(one, Recorder(engine))
    run_to_end(engine)
    assert engine.request_ids == ("a",)
    assert not engine.has_work()
    assert engine.load_report().free_blocks == 3
    frame = engine.read_kv(one.request_id, range(1, 3), range(2, 18))
    assert frame.shape == (2, 2, 1, 16, 2)
    assert frame[0, 0, 0, :, 0].tolist() == list(range(2, 18))
    engine.release(one.request_id)
    engine.release(one.request_id)
    assert engine.load_report().free_blocks == 8
    with pytest.raises(NoSuchHandoff):
        engine.read_kv(one.request_id, LAYERS, range(1))


def test_a_first_token_that_ends_the_request_leaves_no_lease() -> None:
    engine = fake_engine()
    one = request("a", range(18), greedy(max_tokens=1))
    engine.add_prefill(one, Recorder(engine))
    assert run_to_end(engine)["a"][-1].finish == Finish(FinishReason.LENGTH)
    assert engine.request_ids == ()
    assert engine.load_report().free_blocks == 32


@pytest.mark.parametrize("num_steps", [0, 1, 2, 9], ids=["waiting", "computing", "half way", "leased"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_prefill_that_is_kept_generates_what_one_engine_does(num_steps: int, prefix_cache: bool) -> None:
    engine = fake_engine(num_blocks=16, max_batch_tokens=4, prefix_cache=prefix_cache)
    one = request("a", range(11), SamplingParams(seed=5, max_tokens=9))
    engine.add_prefill(one, Recorder(engine))
    first = [output for _ in range(num_steps) for output in engine.step()]
    engine.keep(RequestId("a"))
    engine.check()
    with pytest.raises(NoSuchHandoff):
        engine.read_kv(RequestId("a"), LAYERS, range(1))
    assert token_ids(first + run_to_end(engine)["a"]) == reference_tokens(one)
    engine.keep(RequestId("a"))  # late
    assert engine.load_report().free_blocks == 16


def test_a_prefill_that_is_kept_computes_its_last_block_again_and_nothing_else() -> None:
    engine = fake_engine(max_batch_tokens=16)
    engine.add_prefill(request("a", range(11)), Recorder(engine))
    assert len(engine.step()) == 1
    engine.keep(RequestId("a"))
    engine.step()
    assert engine.last_step.num_prompt_tokens == 4  # of 11 and the first token, 8 are two whole blocks
    assert engine.last_step.admitted == ()  # nobody's news


def test_a_prefill_whose_end_the_pool_cannot_hold_is_not_kept() -> None:
    engine = fake_engine(num_blocks=4)
    engine.add_prefill(request("a", range(11), greedy(30)), Recorder(engine))
    engine.step()
    with pytest.raises(RejectedError, match="pool") as refused:
        engine.keep(RequestId("a"))
    assert refused.value.reason is RejectReason.TOO_LONG
    assert engine.read_kv(RequestId("a"), LAYERS, range(11)).shape[3] == 11
    engine.release(RequestId("a"))
    engine.check()


def test_a_prefill_is_not_kept_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine()
    engine.add_prefill(request("a", range(11)), Recorder(engine))
    engine.step()
    read = KvPool.read

    def read_and_keep(pool: KvPool, *box: object) -> torch.Tensor:
        with pytest.raises(TransferError, match="in_use"):
            engine.keep(RequestId("a"))
        return read(pool, *box)  # type: ignore[arg-type]

    monkeypatch.setattr(KvPool, "read", read_and_keep)
    assert engine.read_kv(RequestId("a"), LAYERS, range(11)).shape[3] == 11
    monkeypatch.undo()
    engine.keep(RequestId("a"))
    assert len(token_ids(run_to_end(engine)["a"])) == 7


def test_prefills_are_not_preempted_and_decodes_yield_to_them() -> None:
    engine = fake_engine(num_blocks=8, max_batch_tokens=4, prefix_cache=False)
    engine.add(request("decode", range(8), greedy(max_tokens=20, ignore_eos=True)))
    for _ in range(3):
        engine.step()
    recorder = Recorder(engine)
    engine.add_prefill(request("prefill", range(50, 66)), recorder)
    outputs: dict[str, list[RequestOutput]] = {}
    preempted = 0
    for _ in range(30):
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        preempted += engine.last_step.num_preempted
        engine.check()
    assert preempted == 1
    assert sorted(token for _, tokens in recorder.ready for token in tokens) == sorted([*range(16)] * 2)
    assert engine.has_work(), "the decode waits for the lease to end"
    engine.release(RequestId("prefill"))
    outputs["decode"] += run_to_end(engine)["decode"]
    expected = reference_tokens(request("decode", range(8), greedy(max_tokens=20, ignore_eos=True)))
    assert token_ids(outputs["decode"]) == expected[-len(token_ids(outputs["decode"])) :]
    assert outputs["decode"][-1].tokens[-1].index == 19


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, 2**32 - 1, -1])
def test_a_first_token_that_is_none_of_the_models_does_not_join_the_batch(token_id: int) -> None:
    source, target = fake_engine(), fake_engine()
    hand_over(source, target, request("a", range(16)))
    one = request("b", range(16))
    assert target.reserve(one).held_tokens == 16
    with pytest.raises(TransferError, match="not in the vocabulary"):
        target.activate(one.request_id, [token_id])
    target.check()
    target.activate(one.request_id, [1])
    assert run_to_end(target)["b"][-1].finish is not None


def test_held_prefix_needs_no_writing_and_may_not_be_written() -> None:
    source, target = fake_engine(), fake_engine()
    hand_over(source, target, request("a", range(18)))
    one = request("b", [*range(17), 60])
    assert target.reserve(one).held_tokens == 16
    with pytest.raises(TransferError, match="outside"):
        target.write_kv(one.request_id, LAYERS, range(15, 18), torch.zeros(3, 2, 1, 3, 2))
    with pytest.raises(TransferError, match="2 tokens has not landed"):
        target.activate(one.request_id, [1])
    target.check()
    source.add_prefill(one, Recorder(source, target, held_tokens=16))
    first = token_ids(run_to_end(source)["b"])
    target.activate(one.request_id, first)
    assert first + token_ids(run_to_end(target)["b"]) == reference_tokens(one)


@pytest.mark.parametrize(
    ("layers", "tokens", "shape"),
    [
        (range(3), range(17, 20), (3, 2, 1, 3, 2)),
        (range(2, 4), range(3), (2, 2, 1, 3, 2)),
        (range(3), range(3, 3), (3, 2, 1, 0, 2)),
        (range(3), range(0, 6, 2), (3, 2, 1, 3, 2)),
        (range(3), range(3), (3, 2, 1, 4, 2)),
    ],
    ids=["tokens", "layers", "empty", "steps", "shape"],
)
def test_frames_that_do_not_fit_are_refused_and_change_nothing(
    layers: range, tokens: range, shape: tuple[int, ...]
) -> None:
    engine = fake_engine()
    one = request("a", range(18))
    engine.reserve(one)
    with pytest.raises(TransferError):
        engine.write_kv(one.request_id, layers, tokens, torch.ones(shape))
    with pytest.raises(TransferError):
        engine.write_kv(one.request_id, LAYERS, range(3), torch.ones(3, 2, 1, 3, 2, dtype=torch.bfloat16))
    with pytest.raises(TransferError, match="direction"):
        engine.read_kv(one.request_id, LAYERS, range(3))
    assert not engine._handoffs._pool.kv.any()
    engine.check()


def test_a_part_may_be_written_twice_but_every_part_once_at_least() -> None:
    engine = fake_engine()
    one = request("a", range(5))
    engine.reserve(one)
    for layers, tokens in ((range(2), range(5)), (range(1, 3), range(4)), (range(2), range(5))):
        engine.write_kv(one.request_id, layers, tokens, torch.zeros(len(layers), 2, 1, len(tokens), 2))
    with pytest.raises(TransferError, match="1 tokens"):
        engine.activate(one.request_id, [1])


def test_reservations_are_refused_when_there_is_no_room() -> None:
    engine = fake_engine(num_blocks=8, max_num_requests=2)
    engine.reserve(request("a", range(14)))
    with pytest.raises(RejectedError) as caught:
        engine.reserve(request("b", range(14)))
    assert caught.value.reason is RejectReason.NO_BLOCKS
    with pytest.raises(DuplicateRequest):
        engine.reserve(request("a", range(3)))
    with pytest.raises(PromptTooLong):
        engine.reserve(request("long", range(30)))
    engine.reserve(request("b", range(3)))
    with pytest.raises(RejectedError) as caught:
        engine.reserve(request("c", range(3)))
    assert caught.value.reason is RejectReason.QUEUE_FULL
    engine.check()
    assert engine.abort(RequestId("a"))
    engine.reserve(request("c", range(3)))
    assert engine.load_report().num_waiting == 2


def test_requests_that_wait_for_blocks_go_before_new_reservations() -> None:
    engine = fake_engine(num_blocks=8)
    engine.add(request("a", range(10), greedy(max_tokens=6, ignore_eos=True)))
    engine.step()
    engine.add(request("b", range(50, 74), greedy(max_tokens=2)))
    engine.step()
    with pytest.raises(RejectedError, match="other requests wait"):
        engine.reserve(request("c", [1]))
    engine.abort(RequestId("b"))
    engine.reserve(request("c", [1]))


def test_preempted_requests_go_before_new_reservations() -> None:
    engine = fake_engine(num_blocks=8)
    engine.add(request("a", range(10), greedy(max_tokens=22, ignore_eos=True)))
    engine.add(request("b", range(50, 60), greedy(max_tokens=22, ignore_eos=True)))
    while not engine.last_step.num_preempted:
        engine.step()
    with pytest.raises(RejectedError) as caught:
        engine.reserve(request("c", [1]))
    assert caught.value.reason is RejectReason.NO_BLOCKS
    run_to_end(engine)
    engine.reserve(request("c", [1]))


def test_several_first_tokens_continue_a_generation() -> None:
    params = SamplingParams(seed=8, max_tokens=20, ignore_eos=True, presence_penalty=1.0)
    one = request("a", range(9), params)
    expected = reference_tokens(one)
    source, target = fake_engine(), fake_engine()
    target.reserve(one)
    source.add_prefill(one, Recorder(source, target))
    run_to_end(source)
    target.activate(one.request_id, expected[:7])
    outputs = run_to_end(target)["a"]
    assert outputs[0].tokens[0].index == 7
    assert token_ids(outputs) == expected[7:]


def test_first_tokens_that_end_the_request_end_it() -> None:
    one = request("a", range(9), greedy(max_tokens=1))
    source, target = fake_engine(), fake_engine()
    target.reserve(one)
    source.add_prefill(one, Recorder(source, target))
    first = token_ids(run_to_end(source)["a"])
    target.activate(one.request_id, first)
    assert target.has_work()
    assert target.step() == [RequestOutput(one.request_id, (), Finish(FinishReason.LENGTH))]
    assert not target.has_work()
    assert target.load_report().free_blocks == 32


def test_inexact_kv_is_not_shared_until_it_is_recomputed() -> None:
    source, target = fake_engine(), fake_engine()
    one = request("a", range(18))
    assert token_ids(hand_over(source, target, one, exact=False)) == reference_tokens(one)
    assert target.load_report().cached_blocks == 0
    assert target.reserve(request("b", range(18))).held_tokens == 0


class Paused:
    """A pool copy by another thread waits in the middle until it is told to go on."""

    def __init__(self, pool: KvPool, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        copy = getattr(pool, name)

        def slow(*arguments: object) -> object:
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.go_on.wait(SHORT_S)
            return copy(*arguments)

        monkeypatch.setattr(pool, name, slow)


@pytest.mark.parametrize("side", ["read", "write"])
def test_an_abort_during_a_copy_quarantines_the_blocks_until_it_ends(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_engine(num_blocks=8)
    drained = threading.Event()
    engine.notify_drained(drained.set)
    one = request("a", range(18))
    if side == "read":
        engine.add_prefill(one, Recorder(engine))
        run_to_end(engine)
        copier = threading.Thread(target=engine.read_kv, args=(one.request_id, LAYERS, range(18)))
    else:
        engine.reserve(one)
        frame = torch.ones(3, 2, 1, 18, 2)
        copier = threading.Thread(target=engine.write_kv, args=(one.request_id, LAYERS, range(18), frame))
    paused = Paused(engine._handoffs._pool, monkeypatch, side)
    copier.start()
    assert paused.reached.wait(SHORT_S)
    if side == "write":
        with pytest.raises(TransferError, match="1 writes in progress"):
            engine.activate(one.request_id, [1])
    assert engine.abort(one.request_id)
    engine.check()
    assert engine.load_report().free_blocks == 3, "what is being copied is not given to anybody else"
    with pytest.raises(NoSuchHandoff):
        engine.read_kv(one.request_id, LAYERS, range(1))
    engine.add(request("a", [1, 2, 3]))  # the same id may come again
    run_to_end(engine)
    paused.go_on.set()
    assert drained.wait(SHORT_S)
    copier.join(SHORT_S)
    engine.check()
    assert engine.load_report().free_blocks == 8
