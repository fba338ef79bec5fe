"""The thread that owns an engine: calls between steps, idling, failures, stopping."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from core.errors import DuplicateRequest
from core.ids import RequestId
from core.kv_events import BlocksStored
from core.request import GenerateRequest
from engine.blocks import Owner
from engine.contract import NoFiniteLogits, StepFailed
from engine.engine import Engine
from engine.loop import EngineLoop, EngineStopped, Failure, StepResult
from tests.fake_model import FakeRunner, fake_engine, greedy, reference_tokens

DEADLINE_S = 10.0


class Watch:
    """Collects what the loop reports; waits for a condition on it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.results: list[StepResult] = []
        self.failures: list[Failure] = []
        self._changed = threading.Condition()
        self.loop = EngineLoop(engine, self._on_step, self._on_failure, name="engine under test")

    def _on_step(self, result: StepResult) -> None:
        assert threading.current_thread().name == "engine under test"
        with self._changed:
            self.results.append(result)
            self._changed.notify_all()

    def _on_failure(self, failure: Failure) -> None:
        with self._changed:
            self.failures.append(failure)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S)

    def wait_for_failure(self, request_id: str) -> None:
        self.wait_for(lambda: any(request_id in failure.request_ids for failure in self.failures))

    def tokens(self, request_id: str) -> list[int]:
        outputs = [output for result in list(self.results) for output in result.outputs]
        return [token.token_id for output in outputs if output.request_id == request_id for token in output.tokens]

    def is_finished(self, *request_ids: str) -> bool:
        ended = {output.request_id for result in self.results for output in result.outputs if output.finish}
        return ended >= set(request_ids)


def request(name: str, *prompt: int, max_tokens: int = 8) -> GenerateRequest:
    return GenerateRequest(RequestId(name), prompt, greedy(max_tokens))


def adding(one: GenerateRequest) -> Callable[[Engine], int]:
    return lambda engine: engine.add(one)


def runner_of(engine: Engine) -> FakeRunner:
    runner = engine._executor._runner
    assert isinstance(runner, FakeRunner)
    return runner


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch(fake_engine(num_blocks=64))
    watch.loop.start()
    yield watch
    assert watch.loop.stop(DEADLINE_S)
    watch.engine.check()
    assert not watch.engine.request_ids or any(failure.is_fatal for failure in watch.failures)


def test_requests_of_many_threads_are_served(watch: Watch) -> None:
    requests = [request(f"r{at}", at, at + 1, at + 2) for at in range(12)]
    futures: list[Future[int]] = []
    threads = [
        threading.Thread(target=lambda one=one: futures.append(watch.loop.call(adding(one)))) for one in requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    watch.wait_for(lambda: watch.is_finished(*(one.request_id for one in requests)))
    for one in requests:
        assert watch.tokens(one.request_id) == reference_tokens(one)
    assert [future.result(DEADLINE_S) for future in futures] == [0] * 12
    assert not watch.failures


def test_calls_return_results_and_errors_and_report(watch: Watch) -> None:
    assert watch.loop.call(lambda engine: engine.layout.block_size).result(DEADLINE_S) == 4
    watch.loop.call(adding(request("a", 1, 2, 3, 4, 5))).result(DEADLINE_S)
    with pytest.raises(DuplicateRequest):
        watch.loop.call(lambda engine: (engine.reserve(request("b", 1)), engine.reserve(request("b", 1)))).result(
            DEADLINE_S
        )
    watch.loop.call(lambda engine: engine.abort(RequestId("b"))).result(DEADLINE_S)
    watch.wait_for(lambda: watch.is_finished("a"))
    events = [event for result in watch.results for event in result.kv_events]
    assert isinstance(events[0], BlocksStored)
    last = watch.results[-1].load
    assert (last.num_running, last.free_blocks) == (0, 64)
    assert last.prefill_tokens_per_s > 0
    assert last.decode_step_s > 0


def test_a_cancelled_call_does_not_run(watch: Watch) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def block(_: Engine) -> bool:
        entered.set()
        return go_on.wait(DEADLINE_S)

    first = watch.loop.call(block)
    assert entered.wait(DEADLINE_S)
    second = watch.loop.call(adding(request("a", 1)))
    assert second.cancel()
    go_on.set()
    assert first.result(DEADLINE_S)
    assert watch.loop.call(lambda engine: engine.request_ids).result(DEADLINE_S) == ()


def test_a_stalled_engine_goes_on_when_a_lease_ends(watch: Watch) -> None:
    class Nobody:
        def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None: ...

    engine = fake_engine(num_blocks=8)
    small = Watch(engine)
    small.loop.start()
    small.loop.call(lambda engine: engine.add_prefill(request("lease", *range(22)), Nobody())).result(DEADLINE_S)
    small.wait_for(lambda: bool(small.tokens("lease")))
    small.loop.call(adding(request("waits", *range(50, 64)))).result(DEADLINE_S)
    assert small.loop.call(lambda engine: engine.load_report().num_waiting).result(DEADLINE_S) == 1
    small.loop.call(lambda engine: engine.release(RequestId("lease"))).result(DEADLINE_S)
    small.wait_for(lambda: small.is_finished("waits"))
    assert small.loop.stop(DEADLINE_S)


def test_a_failed_step_fails_its_requests_and_the_loop_goes_on(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    def add_and_break(engine: Engine) -> None:
        engine.add(request("lost", 1, 2))
        runner_of(engine).fail_next = RuntimeError("no memory")

    watch.loop.call(add_and_break).result(DEADLINE_S)
    watch.wait_for(lambda: bool(watch.failures))
    assert watch.failures[0].request_ids == ("lost",)
    assert isinstance(watch.failures[0].error, StepFailed)
    assert not watch.failures[0].is_fatal
    assert "no memory" in caplog.text
    watch.loop.call(adding(request("next", 1, 2))).result(DEADLINE_S)
    watch.wait_for(lambda: watch.is_finished("next"))


def test_steps_that_fail_again_and_again_end_the_loop_loudly(watch: Watch) -> None:
    def add_and_break(name: str) -> Callable[[Engine], None]:
        def run(engine: Engine) -> None:
            runner_of(engine).fail_next = RuntimeError("broken for good")
            engine.add(request(name, 1, 2))

        return run

    watch.loop.call(lambda engine: engine.reserve(request("reserved", 5))).result(DEADLINE_S)
    for name in ("r0", "r1", "r2"):
        watch.loop.call(add_and_break(name)).result(DEADLINE_S)
        watch.wait_for_failure(name)
    watch.wait_for(lambda: len(watch.failures) == 4)
    assert [failure.is_fatal for failure in watch.failures] == [False, False, False, True]
    assert watch.failures[-1].request_ids == ("reserved",)
    assert "3 steps failed in a row" in str(watch.failures[-1].error)
    assert watch.loop.join(DEADLINE_S)
    with pytest.raises(EngineStopped):
        watch.loop.call(adding(request("late", 1))).result(DEADLINE_S)


def test_poisoned_requests_fail_alone_however_many_in_a_row(watch: Watch) -> None:
    def poison(engine: Engine) -> None:
        runner_of(engine).poison = 77
        engine.add(request("good", 1, 2, 3, max_tokens=50))

    watch.loop.call(poison).result(DEADLINE_S)
    for at in range(5):
        watch.loop.call(adding(request(f"bad{at}", 77, at))).result(DEADLINE_S)
        watch.wait_for_failure(f"bad{at}")
    watch.wait_for(lambda: watch.is_finished("good"))
    assert watch.tokens("good") == reference_tokens(request("good", 1, 2, 3, max_tokens=50))
    assert [failure.request_ids for failure in watch.failures] == [(f"bad{at}",) for at in range(5)]
    assert all(isinstance(failure.error, NoFiniteLogits) and not failure.is_fatal for failure in watch.failures)
    watch.loop.call(adding(request("next", 1, 2))).result(DEADLINE_S)
    watch.wait_for(lambda: watch.is_finished("next"))


def test_books_in_doubt_end_the_loop_loudly(watch: Watch) -> None:
    def corrupt(engine: Engine) -> None:
        engine.add(request("a", 1, 2))
        engine._ledger.blocks._owners[:] = bytes([Owner.LEASE]) * 64

    watch.loop.call(corrupt).result(DEADLINE_S)
    watch.wait_for(lambda: bool(watch.failures))
    (failure,) = watch.failures
    assert failure.is_fatal
    assert failure.request_ids == ("a",)
    assert watch.loop.join(DEADLINE_S)
    watch.engine = fake_engine()  # nothing about the broken one can be checked


def test_stop_aborts_what_is_there_and_refuses_the_rest() -> None:
    watch = Watch(fake_engine(num_blocks=64))
    watch.loop.start()
    entered, go_on = threading.Event(), threading.Event()

    def add_and_block(engine: Engine) -> bool:
        engine.add(request("a", 1, 2, max_tokens=50))
        entered.set()
        return go_on.wait(DEADLINE_S)

    watch.loop.call(add_and_block)
    assert entered.wait(DEADLINE_S)
    assert not watch.loop.stop(0.01), "the call in progress is not interrupted"
    refused = watch.loop.call(adding(request("b", 1)))
    go_on.set()
    assert watch.loop.stop(DEADLINE_S)
    with pytest.raises(EngineStopped):
        refused.result(DEADLINE_S)
    assert [failure.request_ids for failure in watch.failures] == [("a",)]
    assert not watch.failures[0].is_fatal
    assert watch.engine.load_report().free_blocks == 64


def test_a_loop_that_never_started_can_be_stopped() -> None:
    watch = Watch(fake_engine())
    pending = watch.loop.call(adding(request("a", 1)))
    assert watch.loop.stop(DEADLINE_S)
    with pytest.raises(EngineStopped):
        pending.result(DEADLINE_S)
