"""The engine: requests in, tokens out, one forward pass per step; prefill and decode together or apart.

A request's path:

1. `add`: it waits, is admitted with its blocks, computed in chunks, decoded, and ends; every `step` returns news.
2. `add_prefill`: the same up to its first token; then its blocks stay under a lease, to be read, until `release`; or
   `keep` lets it go on as if it had been added.
3. `reserve`: blocks for a prompt that another engine computes; KV is written into them, then `activate` lets the
   request join the batch, at its first token or later.
4. A request with a constraint is accepted by any of these, and goes on when `supply` has brought its grammar.

`abort` ends any of these at any moment. Synchronous, knows no network. Everything is called by one thread (see
`engine.loop`) but `read_kv` and `write_kv`, which any thread may call while a step runs (see `engine.handoff`).
"""

from collections.abc import Callable, Sequence

import torch

from core.clock import Clock, MonotonicClock
from core.errors import DuplicateRequest, RejectedError, RejectReason, ServingError
from core.ids import RequestId
from core.kv_events import BlocksStored, KvEvent
from core.layout import KvLayout
from core.membership import LoadReport
from core.request import GenerateRequest, RequestOutput, TokenOutput
from core.text import NewDetokenizer
from engine.blocks import BlockManager, Owner
from engine.config import EngineConfig, ModelConfig
from engine.contract import NoFiniteLogits, PrefillObserver, Reservation, Runner, StepFailed
from engine.detokenize import load_detokenizer
from engine.execution import Executor
from engine.following import Following
from engine.hand_over import HandOver
from engine.handoff import HandoffTable, NoSuchHandoff
from engine.intake import Intake
from engine.ledger import KvLedger
from engine.logprobs import TokenDetail
from engine.prefix_cache import PrefixCache
from engine.quarantine import Quarantine
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, StepStats
from engine.sequence import SequenceEvent, SequenceState, TokenSequence
from engine.token_scores import score_tokens
from grammar.walk import Grammar

__all__ = ["Engine", "PrefillObserver", "Reservation", "StepFailed"]


class Engine:
    """See the module. Attributes: `layout`, `model_info`, `last_step`."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        new_detokenizer: NewDetokenizer | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            new_detokenizer: makes text of token ids; without it stop strings are refused.
            clock: measures how long constraints take.
        """
        clock = clock or MonotonicClock()
        pool = runner.pool
        self.model_info = runner.info
        self.layout: KvLayout = pool.layout
        self.last_step = StepStats()
        self._block_size = pool.layout.block_size
        self._max_waiting = config.max_num_waiting
        blocks = BlockManager(pool.num_blocks)
        cache = PrefixCache(blocks, max_blocks=config.cached_blocks(pool.num_blocks, pool.layout.bytes_per_block))
        self._ledger = KvLedger(blocks, cache, self._block_size)
        self._scheduler = Scheduler(
            self._ledger, max_batch_tokens=config.max_batch_tokens, max_num_requests=config.max_num_requests
        )
        self._handoffs = HandoffTable(pool)
        self._quarantine = Quarantine(self._ledger, self._handoffs)
        self._executor = Executor(
            runner,
            clock,
            layer_group_size=config.layer_group_size,
            score_window=config.score_window,
            mask_wait_s=config.mask_wait_s,
        )
        self._following = Following(clock, mask_wait_s=config.mask_wait_s, mask_timeout_s=config.mask_timeout_s)
        self._intake = Intake(
            runner.info, block_size=self._block_size, num_blocks=pool.num_blocks, new_detokenizer=new_detokenizer
        )
        self._hand_over = HandOver(runner.info, self._ledger, self._scheduler, self._handoffs, self._following)
        self._live: dict[RequestId, TokenSequence] = {}
        self._observers: dict[RequestId, PrefillObserver] = {}
        self._ready_outputs: list[RequestOutput] = []
        self._failed: list[tuple[RequestId, ServingError]] = []
        self._num_arrivals = 0

    @classmethod
    def load(
        cls, model: ModelConfig, config: EngineConfig, *, progress: Callable[[str, float], None] = lambda _, __: None
    ) -> "Engine":
        """Load a checkpoint and allocate its pool.

        Args:
            progress: told (what is being done, fraction of the whole).
        Raises:
            ConfigError: the path, the checkpoint, the device or its memory cannot work.
        """
        runner = ModelRunner.load(model, config, progress)
        return cls(runner, config, load_detokenizer(model.path))

    # One engine for all

    def add(self, request: GenerateRequest) -> int:
        """Queue a request; return how many of its prompt tokens are cached now.

        Raises:
            InvalidRequest, PromptTooLong: it can never work. DuplicateRequest: the id is in use.
            RejectedError: the queue is full. Nothing is kept in any of these cases.
        """
        return self._queue(request, is_prefill=False)

    def supply(self, request_id: RequestId, grammar: Grammar) -> None:
        """Bring a request with a constraint its grammar, once. Ignored when the request has ended."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._hand_over.supply(sequence, grammar)

    def abort(self, request_id: RequestId) -> bool:
        """End a request at whatever point it is, without further output; say whether it was there.

        Its blocks are free at once, or, while another thread copies from or to them, as soon as that has ended.
        """
        before = len(self._ready_outputs)
        self._ready_outputs = [output for output in self._ready_outputs if output.request_id != request_id]
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._end(sequence)
        return sequence is not None or len(self._ready_outputs) < before

    def step(self) -> list[RequestOutput]:
        """Run one step: admit, preempt, compute, sample. Returns nothing when nothing could be computed.

        A request whose logits are not finite, or whose constraint cannot be followed any further, ends without
        output; `take_failed` names it. One whose constraint has not said in time what may come next is left as it is.

        Raises:
            StepFailed: computing failed; the engine can go on once the named requests are aborted.
        """
        self._quarantine.collect()
        self._settle(can_wait=all(sequence.is_held for sequence in self._scheduler.running))
        plan = self._scheduler.schedule()
        self.last_step = plan.stats()
        for sequence in plan.admitted:
            if sequence.is_prefill:
                self._hand_over.open_lease(sequence, self._observers[sequence.request_id])
        if plan.shares:
            try:
                choices = self._executor.compute(plan.shares, self._observers)
            except Exception as error:
                raise StepFailed(tuple(sequence.request_id for sequence, _ in plan.shares), error) from error
            row = -1
            for sequence, share in plan.shares:
                is_complete = sequence.num_computed + share == len(sequence.tokens)
                row += is_complete
                if is_complete and row in choices.unknown:  # its last token is computed once more
                    sequence.num_computed += share - 1
                elif is_complete and (row in choices.failed or not sequence.is_scored_well):
                    # Before anything of this step is shared.
                    self._failed.append((sequence.request_id, NoFiniteLogits()))
                    self._end(sequence)
                else:
                    sequence.num_computed += share
                    if sequence.num_computed // self._block_size > len(sequence.chain):
                        self._ledger.index(sequence)
                    if is_complete:
                        output = self._advance(sequence, choices.token_ids[row], choices.details.get(row))
                        self._ready_outputs.append(output)
        outputs, self._ready_outputs = self._ready_outputs, []
        return outputs

    def take_failed(self) -> list[tuple[RequestId, ServingError]]:
        """Return the requests that ended on their own since the last call, and why."""
        failed, self._failed = self._failed, []
        return failed

    def has_work(self) -> bool:
        """Say whether a step could produce anything, now or when blocks come back."""
        return bool(self._scheduler.running or self._scheduler.waiting or self._ready_outputs)

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """Every request that is here, in whatever state."""
        return tuple(self._live)

    # Prefill side of a hand-off

    def add_prefill(self, request: GenerateRequest, observer: PrefillObserver) -> int:
        """Like `add`, but the request leaves the batch after its first token and its blocks stay, under a lease.

        If the first token ends the request, its output says so and there is no lease.
        """
        cached_tokens = self._queue(request, is_prefill=True)
        self._observers[request.request_id] = observer
        return cached_tokens

    def read_kv(
        self,
        request_id: RequestId,
        layers: range,
        tokens: range,
        out: torch.Tensor | None = None,
        heads: range | None = None,
    ) -> torch.Tensor:
        """Copy KV of a prefill, announced by its observer, into a canonical frame [layers, 2, heads, T, D]. Any thread.

        Args:
            out: frame to fill; made when absent.
            heads: all by default.
        Raises:
            NoSuchHandoff: the lease has ended, or the request never was here.
            TransferError: the range is outside of the prompt.
        """
        return self._handoffs.read(request_id, layers, tokens, out, heads)

    def score_tokens(self, request_id: RequestId) -> torch.Tensor | None:
        """Return float32 [T] scores of the prompt tokens of a leased prefill: how much its last tokens attend to each.

        Any thread. None when there are none: `score_window` is 0, or a token's place in the pool has to be its
        position, so that none may be left out.

        Raises:
            NoSuchHandoff: the lease has ended, or the request never was here.
        """
        sequence = self._live.get(request_id)
        if sequence is None:
            raise NoSuchHandoff(request_id)
        queries = sequence.window_queries
        if queries is None or self.model_info.has_sliding_window:
            return None
        keys = self._handoffs.read_keys(request_id, range(sequence.num_prompt_tokens))
        return score_tokens(zip(queries, keys, strict=True))

    def read_tokens(self, request_id: RequestId, layers: range, tokens: torch.Tensor, heads: range) -> torch.Tensor:
        """Copy KV of some tokens of a prefill into a frame [layers, 2, heads, T, D]. Any thread.

        Args:
            tokens: int64 [T], positions in the prompt, ascending.
        Raises:
            NoSuchHandoff, TransferError: as `read_kv`.
        """
        return self._handoffs.read_some(request_id, layers, tokens, heads)

    def release(self, request_id: RequestId) -> None:
        """End the lease, if it is there: full prompt blocks stay in the prefix cache, the rest becomes free."""
        sequence = self._live.get(request_id)
        if sequence is not None and sequence.state is SequenceState.LEASED:
            self._end(sequence)

    def keep(self, request_id: RequestId) -> None:
        """Let a prefill that is handed to nobody go on here, to its end. Ignored when its first token was its last.

        A lease ends, and the request waits for its turn at its old place, as one that was preempted: what is in the
        prefix cache by then is not computed again, which is all but the last block unless others needed room.

        Raises:
            RejectedError: the whole pool cannot hold it to its end. TransferError: its KV is being copied.
        """
        sequence = self._live.get(request_id)
        if sequence is None or not sequence.is_prefill:
            return
        self._hand_over.keep(sequence)
        self._observers.pop(request_id, None)

    # Decode side of a hand-off

    def reserve(self, request: GenerateRequest) -> Reservation:
        """Take blocks for the whole prompt and one token; cached ones are shared.

        Raises:
            InvalidRequest, PromptTooLong, DuplicateRequest: as `add`.
            RejectedError: no place in the batch, or not enough blocks. Nothing is kept in any of these cases.
        """
        self._quarantine.collect()
        sequence = self._new_sequence(request, SequenceState.RESERVED, is_prefill=False)
        reservation = self._hand_over.reserve(sequence)
        self._live[sequence.request_id] = sequence
        return reservation

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: torch.Tensor, heads: range | None = None
    ) -> None:
        """Copy a canonical frame into a reservation. Any thread; a part may come again, as long as it is the same.

        Raises:
            NoSuchHandoff: the reservation has ended, or never was here.
            TransferError: wrong shape or dtype, or a range outside of what was reserved to be written.
        """
        self._handoffs.write(request_id, layers, tokens, kv, heads)

    def activate(
        self, request_id: RequestId, first_tokens: Sequence[int], *, exact: bool = True, num_dropped: int = 0
    ) -> None:
        """Let a reserved request, whose KV has been written whole, go on after the tokens generated elsewhere.

        If these end the request already, the next `step` says so. A constraint's grammar was supplied before.

        Args:
            first_tokens: everything generated so far; at least one.
            exact: the KV is what the model computes here; if not, it is never shared with other requests.
            num_dropped: prompt tokens whose KV was left out; that of the others was written to the first places.
        Raises:
            NoSuchHandoff: there is no such reservation.
            TransferError: KV is missing, being written, or left out of a model that needs it, or these are no tokens
                of the model; the reservation stays.
        """
        sequence = self._live.get(request_id)
        if sequence is None:
            raise NoSuchHandoff(request_id)
        finish = self._hand_over.activate(sequence, first_tokens, exact=exact, num_dropped=num_dropped)
        if finish is not None:
            self._ready_outputs.append(RequestOutput(request_id, (), finish))
            self._end(sequence)

    # What others may know

    def load_report(self) -> LoadReport:
        """Return counts; the rates are the loop's."""
        self._quarantine.collect()
        return self._scheduler.load_report()

    def take_kv_events(self) -> list[KvEvent]:
        """Return the changes of the prefix cache since the last call, in order."""
        return self._ledger.cache.take_events()

    def snapshot_cache(self) -> list[BlocksStored]:
        """Return the whole prefix cache as chains, parents first; it includes every event taken so far and pending."""
        return self._ledger.cache.snapshot()

    def notify_drained(self, on_drained: Callable[[], None]) -> None:
        """Have `on_drained` called, from a transfer thread, when blocks that a copy had kept can be collected."""
        self._handoffs.on_drained = on_drained

    def check(self) -> None:
        """Assert that every block has exactly one owner and that all books agree."""
        self._quarantine.collect()
        self._ledger.check(self._live.values(), self._quarantine.sequences)
        self._scheduler.check(self._live.values())
        assert self._observers.keys() <= self._live.keys()
        self._following.check(self._live)

    # Inside

    def _queue(self, request: GenerateRequest, *, is_prefill: bool) -> int:
        state = SequenceState.WAITING if request.sampling.constraint is None else SequenceState.UNREADY
        sequence = self._new_sequence(request, state, is_prefill=is_prefill)
        if self._scheduler.num_queued >= self._max_waiting:
            raise RejectedError(RejectReason.QUEUE_FULL, f"{self._max_waiting} requests are waiting")
        self._live[sequence.request_id] = sequence
        self._scheduler.add(sequence)
        return self._ledger.cached_tokens(sequence)

    def _new_sequence(self, request: GenerateRequest, state: SequenceState, *, is_prefill: bool) -> TokenSequence:
        if request.request_id in self._live:
            raise DuplicateRequest(f"request {request.request_id} is in flight")
        self._num_arrivals += 1
        return self._intake.sequence(request, arrival=self._num_arrivals, state=state, is_prefill=is_prefill)

    def _advance(self, sequence: TokenSequence, token_id: int, detail: TokenDetail | None) -> RequestOutput:
        """Take a sampled token into a sequence and let it live on, lease or end accordingly."""
        index = sequence.num_generated
        finish = self._following.advance(sequence, token_id, sequence.push(token_id))
        if finish is not None:
            self._end(sequence)
        elif sequence.is_prefill:
            self._scheduler.remove(sequence)
            self._ledger.change_owner(sequence, Owner.LEASE)
            sequence.handle(SequenceEvent.PREFILLED)
            del self._observers[sequence.request_id]
        logprobs = (detail.logprob, detail.top_logprobs) if detail else ()
        token, scores = TokenOutput(index, token_id, *logprobs), sequence.take_scores()
        return RequestOutput(sequence.request_id, (token,), finish, scores)

    def _settle(self, *, can_wait: bool) -> None:
        """End the requests whose constraint says that they are over, or cannot be followed."""
        for sequence, how in self._following.settle(can_wait=can_wait):
            if isinstance(how, ServingError):
                self._failed.append((sequence.request_id, how))
            else:
                self._ready_outputs.append(RequestOutput(sequence.request_id, (), how))
            self._end(sequence)

    def _end(self, sequence: TokenSequence) -> None:
        """Take a request out of everything; its blocks go back, or to quarantine while they are being copied."""
        self._scheduler.remove(sequence)
        del self._live[sequence.request_id]
        self._observers.pop(sequence.request_id, None)
        self._following.end(sequence)
        self._quarantine.release(sequence)
        sequence.handle(SequenceEvent.ENDED)
