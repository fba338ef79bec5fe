"""The one thread that owns an engine: it steps while there is work and runs what others ask for in between.

Other threads never touch the engine (but `read_kv` and `write_kv`): they `call` a function, which runs between two
steps and whose result comes back in a future. Nothing here is asynchronous; a service bridges the callbacks.

Failures: a request whose own logits are no numbers is reported, and nobody else notices. When computing a step fails,
the requests of that step are aborted and reported, and the loop goes on. When that happens several times in a row, or
when the engine's books are in doubt (any other exception), the loop fails all requests, reports itself broken and
ends; every later call is refused. It never ends silently.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any, TypeVar

from core.clock import Clock, MonotonicClock
from core.errors import ServingError
from core.ids import RequestId
from core.kv_events import KvEvent
from core.membership import LoadReport
from core.request import RequestOutput
from engine.contract import StepFailed
from engine.engine import Engine
from engine.scheduler import StepStats

_LOG = logging.getLogger(__name__)
_FAILED_STEPS_IN_A_ROW = 3
_STALLED_WAIT_S = 0.5  # requests wait for blocks: whatever frees some wakes the loop; this only bounds a mistake
_IDLE_WAIT_S = 60.0  # nothing to do: every call wakes the loop
_RATE_WEIGHT = 0.1  # of the newest step in the moving averages

T = TypeVar("T")


class EngineStopped(ServingError):
    """The engine's loop has ended, on purpose or because the engine broke."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    retryable = True


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one turn of the loop brought: a step, calls, or both.

    Attributes:
        step_s: seconds of the step; 0 when there was none.
    """

    outputs: list[RequestOutput]
    kv_events: list[KvEvent]
    load: LoadReport
    stats: StepStats
    step_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """These requests are lost and hold nothing any more. `is_fatal`: so is the engine."""

    request_ids: tuple[RequestId, ...]
    error: ServingError
    is_fatal: bool


class _Rates:
    """Moving averages of what the engine achieves."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0

    def note(self, stats: StepStats, step_s: float) -> None:
        if step_s <= 0.0:
            return
        if stats.num_prompt_tokens:
            self.prefill_tokens_per_s = _mixed(self.prefill_tokens_per_s, stats.num_prompt_tokens / step_s)
        elif stats.num_decodes:
            self.decode_step_s = _mixed(self.decode_step_s, step_s)


def _mixed(average: float, newest: float) -> float:
    return newest if average == 0.0 else average + _RATE_WEIGHT * (newest - average)


class EngineLoop:
    """Owns `engine` from `start` to the end of the thread.

    Args:
        on_step: called on the engine's thread after every turn that brought anything; must not block.
        on_failure: called on the engine's thread; must not block.
    """

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[StepResult], None],
        on_failure: Callable[[Failure], None],
        *,
        clock: Clock | None = None,
        name: str = "engine",
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._clock = clock or MonotonicClock()
        self._changed = Condition()
        self._calls: deque[tuple[Callable[[Engine], Any], Future[Any]]] = deque()
        self._is_stopping = False
        self._has_ended = False
        self._has_drained = False
        self._rates = _Rates()
        self._failed_in_a_row = 0
        self._thread = Thread(target=self._run, name=name, daemon=True)
        engine.notify_drained(self._wake)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Have `function` run on the engine's thread before the next step. Any thread.

        Returns:
            Its result or exception; `EngineStopped` when the loop has ended or ends before its turn comes.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._is_stopping or self._has_ended:
                future.set_exception(EngineStopped("the engine has stopped"))
            else:
                self._calls.append((function, future))
                self._changed.notify()
        return future

    def stop(self, deadline_s: float) -> bool:
        """End after the step in progress; what is still in the engine is aborted. Idempotent, any other thread.

        Returns:
            Whether the thread ended within `deadline_s`.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.ident is None:
            self._finish(EngineStopped("the engine was stopped before it started"), is_fatal=False)
        return self.join(deadline_s)

    def join(self, deadline_s: float) -> bool:
        """Wait for the thread to end; return whether it did."""
        if self._thread.ident is not None:
            self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._changed:
            self._has_drained = True
            self._changed.notify()

    def _run(self) -> None:
        error = EngineStopped("the engine has stopped")
        is_fatal = False
        try:
            is_stalled = False
            while self._wait_for_work(is_stalled):
                is_stalled = self._turn()
        except Exception as cause:
            _LOG.exception("the engine is broken")
            error = (
                cause if isinstance(cause, EngineStopped) else EngineStopped(f"the engine broke: {_one_line(cause)}")
            )
            is_fatal = True
        finally:
            self._finish(error, is_fatal=is_fatal)

    def _wait_for_work(self, is_stalled: bool) -> bool:
        """Wait until there is something to do; return False to end."""

        def has_news() -> bool:
            return bool(self._calls) or self._is_stopping or self._has_drained

        with self._changed:
            if not self._engine.has_work():
                self._changed.wait_for(has_news, _IDLE_WAIT_S)
            elif is_stalled:
                self._changed.wait_for(has_news, _STALLED_WAIT_S)
            self._has_drained = False
            return not self._is_stopping

    def _turn(self) -> bool:
        """Run calls, then a step, then report. Returns whether the engine has work but could do none of it."""
        engine = self._engine
        has_called = self._run_calls()
        outputs: list[RequestOutput] = []
        stats, step_s = StepStats(), 0.0
        if engine.has_work():
            started = self._clock.now()
            try:
                outputs = engine.step()
            except StepFailed as error:
                self._fail_step(error)
            else:
                self._failed_in_a_row = 0
                self._report_failed()
                stats, step_s = engine.last_step, self._clock.now() - started
                self._rates.note(stats, step_s)
        has_stepped = bool(outputs or stats.num_prompt_tokens or stats.num_decodes)
        kv_events = engine.take_kv_events()
        if has_called or has_stepped or kv_events or stats.num_preempted:
            self._on_step(StepResult(outputs, kv_events, self._load(), stats, step_s))
        return not has_stepped

    def _run_calls(self) -> bool:
        has_called = False
        while True:
            with self._changed:
                if not self._calls:
                    return has_called
                function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            has_called = True
            try:
                result = function(self._engine)
            except AssertionError as error:  # our own invariant: the caller learns of it, and so does everybody else
                future.set_exception(error)
                raise
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _report_failed(self) -> None:
        """Report requests that failed on their own, in a step that went well: they never count against the engine."""
        for request_id, error in self._engine.take_failed():
            _LOG.error("%s: %s", request_id, error)
            self._on_failure(Failure((request_id,), error, is_fatal=False))

    def _fail_step(self, error: StepFailed) -> None:
        _LOG.error("%s", error, exc_info=error)
        for request_id in error.request_ids:
            self._engine.abort(request_id)
        self._on_failure(Failure(error.request_ids, error, is_fatal=False))
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _FAILED_STEPS_IN_A_ROW:
            raise EngineStopped(f"{self._failed_in_a_row} steps failed in a row, the last one: {error}") from error

    def _finish(self, error: EngineStopped, *, is_fatal: bool) -> None:
        with self._changed:
            self._has_ended = True
            calls = [future for _, future in self._calls]
            self._calls.clear()
        for future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        request_ids = self._engine.request_ids
        if not is_fatal:
            for request_id in request_ids:
                self._engine.abort(request_id)
        if request_ids or is_fatal:
            self._on_failure(Failure(request_ids, error, is_fatal=is_fatal))

    def _load(self) -> LoadReport:
        return self._engine.load_report().model_copy(
            update={
                "prefill_tokens_per_s": self._rates.prefill_tokens_per_s,
                "decode_step_s": self._rates.decode_step_s,
            }
        )


def _one_line(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()}"
