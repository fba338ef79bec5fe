"""One simulated engine: chunked prefill first come first served, and one continuously batched decode, in virtual time.

Life of a segment: at a step boundary waiting sequences join the batch, then
- with prompts waiting: one step of up to `chunk_tokens` prompt tokens, together with one decode step of the batch;
- without: a run of decode steps up to the first end of a sequence (`simulator.decode_run`), cut at the next step
  boundary when work is added or removed meanwhile;
- with neither: nothing, until something is added.

Knows no blocks and no gateways. Callbacks are called at the boundary where the thing happened, and may add work."""

import asyncio
import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from simulator.decode_run import DecodeRun
from simulator.latency import DecodeLatency, PrefillLatency
from simulator.virtual_time import VirtualLoop

_KEPT_SEGMENTS = 4096

Gaps = tuple[tuple[float, int], ...]
"""(seconds, how many gaps between tokens of so long), in order."""


@dataclass(slots=True, eq=False)
class PromptJob:
    """A prompt to compute.

    Attributes:
        on_start: called when its first chunk begins; returns (tokens to compute, tokens that are there already).
        on_chunk: called with (tokens computed, when the step began).
        expected_tokens: to compute, as far as known before it starts.
    """

    on_start: Callable[[], tuple[int, int]]
    on_chunk: Callable[[int, float], None]
    on_done: Callable[[], None]
    expected_tokens: int
    left: int = 0
    before: int = 0
    is_started: bool = False
    is_removed: bool = False

    @property
    def queued_tokens(self) -> int:
        return self.left if self.is_started else self.expected_tokens


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A sequence to decode. `num_tokens`: still to come (>= 1). `on_end` is given its gaps from joining on."""

    context_tokens: int
    num_tokens: int
    on_end: Callable[[Gaps], None]
    on_join: Callable[[float], None] = lambda first_step_s: None
    joined_at_step: int = -1
    is_removed: bool = False


@dataclass(slots=True)
class _Segment:
    started_at: float
    num_steps: int
    run: DecodeRun | None  # None: a step with prompt chunks
    pieces: list[tuple[PromptJob, int]] = field(default_factory=list)


class Engine:
    """The engine of one machine."""

    def __init__(
        self,
        loop: VirtualLoop,
        prefill: PrefillLatency,
        decode: DecodeLatency,
        *,
        chunk_tokens: int,
        max_batch: int,
        on_step: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._prefill = prefill
        self._decode = decode
        self._chunk_tokens = chunk_tokens
        self._max_batch = max_batch
        self._on_step = on_step  # after every segment
        self._prompts: deque[PromptJob] = deque()
        self._joining: deque[DecodeSequence] = deque()
        self._leaving: list[DecodeSequence] = []
        self._ends: list[tuple[int, int, DecodeSequence]] = []  # (step of the last token, order of joining, sequence)
        self._num_joined = 0
        self._step = 0  # decode steps done at the last boundary
        self._context_tokens = 0  # of the batch, then
        self._segment: _Segment | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_at_boundary = False
        self._gap_ends: list[int] = []  # step at which a segment of gaps ended
        self._gaps: list[float] = []  # mean length of one gap in it
        self.prefill_s = 0.0  # spent on steps with prompts
        self.prefill_tokens = 0
        self.decode_s = 0.0  # spent on steps without
        self.last_step_s = 0.0

    @property
    def num_running(self) -> int:
        return len(self._ends)

    @property
    def num_joining(self) -> int:
        return len(self._joining)

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are to be computed, the running chunk included."""
        return sum(job.queued_tokens for job in self._prompts)

    @property
    def context_tokens(self) -> int:
        """Of the batch, as of the last boundary, and of those who join at the next."""
        return self._context_tokens + sum(sequence.context_tokens for sequence in self._joining)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Over its whole life; 0 before the first prompt."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    def add_prompt(self, job: PromptJob) -> None:
        self._prompts.append(job)
        self._work_changed()

    def add_sequence(self, sequence: DecodeSequence) -> None:
        self._joining.append(sequence)
        self._work_changed()

    def remove_prompt(self, job: PromptJob) -> None:
        """Forget a prompt; none of its callbacks is called any more. A chunk that is being computed is wasted."""
        if not job.is_removed:
            job.is_removed = True
            self._prompts.remove(job)

    def remove_sequence(self, sequence: DecodeSequence) -> None:
        """Take a sequence out of the batch at the next boundary. Nothing to do for one that has ended."""
        if sequence in self._joining:
            self._joining.remove(sequence)
        elif sequence.joined_at_step >= 0 and not sequence.is_removed:
            self._leaving.append(sequence)
            self._work_changed()
        sequence.is_removed = True

    def _work_changed(self) -> None:
        """Something was added or removed: it counts from the next boundary."""
        if self._is_at_boundary:
            return
        segment = self._segment
        if segment is None:
            self._begin()
        elif segment.run is not None:
            num_steps = max(1, segment.run.steps_until(self._loop.now() - segment.started_at))
            if num_steps < segment.num_steps:
                segment.num_steps = num_steps
                self._arm(segment.started_at + segment.run.steps_s(num_steps))

    def _begin(self) -> None:
        """Start the next segment; the boundary is now."""
        while self._joining and len(self._ends) < self._max_batch:
            self._join(self._joining.popleft())
        pieces = self._next_pieces()
        now = self._loop.now()
        if pieces:
            decode_s = self._decode.step_s(len(self._ends), self._context_tokens)
            duration_s = decode_s + self._prefill.step_s((tokens, job.before) for job, tokens in pieces)
            self._segment = _Segment(now, 1 if self._ends else 0, None, pieces)
        elif self._ends:
            run = DecodeRun.of(self._decode, len(self._ends), self._context_tokens)
            num_steps = self._ends[0][0] - self._step
            duration_s = run.steps_s(num_steps)
            self._segment = _Segment(now, num_steps, run)
        else:
            self._segment = None
            return
        first_step_s = self._segment.run.first_s if self._segment.run is not None else duration_s
        for _, _, sequence in self._ends:
            if sequence.joined_at_step == self._step and not sequence.is_removed:
                sequence.on_join(first_step_s)
        self._arm(now + duration_s)

    def _join(self, sequence: DecodeSequence) -> None:
        sequence.joined_at_step = self._step
        self._context_tokens += sequence.context_tokens
        heapq.heappush(self._ends, (self._step + sequence.num_tokens, self._num_joined, sequence))
        self._num_joined += 1

    def _next_pieces(self) -> list[tuple[PromptJob, int]]:
        pieces = []
        room = self._chunk_tokens
        for job in self._prompts:
            if room == 0:
                break
            if not job.is_started:
                job.is_started = True
                job.left, job.before = job.on_start()
            tokens = min(job.left, room)
            room -= tokens
            pieces.append((job, tokens))
        return pieces

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._on_boundary)

    def _on_boundary(self) -> None:
        segment, self._segment, self._timer = self._segment, None, None
        assert segment is not None
        self._is_at_boundary = True
        try:
            self._account(segment)
            self._step += segment.num_steps
            self._context_tokens += segment.num_steps * len(self._ends)
            self._leave()
            while self._ends and self._ends[0][0] <= self._step:
                _, _, ended = heapq.heappop(self._ends)
                self._context_tokens -= ended.context_tokens + ended.num_tokens
                ended.is_removed = True
                ended.on_end(self._gaps_since(ended.joined_at_step))
            for job, tokens in segment.pieces:
                self._advance(job, tokens, segment.started_at)
        finally:
            self._is_at_boundary = False
        self._begin()
        self._on_step()

    def _account(self, segment: _Segment) -> None:
        duration_s = self._loop.now() - segment.started_at
        if segment.run is None:
            self.prefill_s += duration_s
            self.prefill_tokens += sum(tokens for _, tokens in segment.pieces)
        else:
            self.decode_s += duration_s
        if segment.num_steps:
            self.last_step_s = duration_s / segment.num_steps
            self._gap_ends.append(self._step + segment.num_steps)
            self._gaps.append(self.last_step_s)
            if len(self._gaps) > 2 * _KEPT_SEGMENTS:
                self._forget_gaps()

    def _forget_gaps(self) -> None:
        oldest = min((sequence.joined_at_step for _, _, sequence in self._ends), default=self._step)
        keep_from = bisect_right(self._gap_ends, oldest)
        del self._gap_ends[:keep_from], self._gaps[:keep_from]

    def _gaps_since(self, step: int) -> Gaps:
        gaps = []
        for position in range(bisect_right(self._gap_ends, step), len(self._gaps)):
            gaps.append((self._gaps[position], self._gap_ends[position] - step))
            step = self._gap_ends[position]
        return tuple(gaps)

    def _leave(self) -> None:
        """Take out who was removed while the segment ran."""
        if not self._leaving:
            return
        for sequence in self._leaving:
            self._context_tokens -= sequence.context_tokens + self._step - sequence.joined_at_step
        gone = {id(sequence) for sequence in self._leaving}
        self._ends = [end for end in self._ends if id(end[2]) not in gone]
        heapq.heapify(self._ends)
        self._leaving.clear()

    def _advance(self, job: PromptJob, tokens: int, started_at: float) -> None:
        if job.is_removed:
            return
        job.left -= tokens
        job.before += tokens
        job.on_chunk(tokens, started_at)
        if job.left == 0 and not job.is_removed:
            job.is_removed = True
            self._prompts.remove(job)
            job.on_done()
