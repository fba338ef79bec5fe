"""What becomes of a request around a hand-off: its blocks are lent out, kept, reserved, or taken into the batch.

The inside of `Engine.supply`, `add_prefill`, `keep`, `reserve` and `activate`, which say what they promise. Engine
thread only.
"""

from collections.abc import Sequence

from core.blocks import num_blocks
from core.errors import RejectedError, RejectReason, TransferError
from core.request import Finish
from engine.blocks import Owner
from engine.checkpoint import ModelInfo
from engine.contract import PrefillObserver, Reservation
from engine.following import Following
from engine.handoff import HandoffTable
from engine.ledger import KvLedger
from engine.scheduler import Scheduler
from engine.sequence import SequenceEvent, SequenceState, TokenSequence
from grammar.walk import Grammar


class HandOver:
    """Changes requests and the books about them; keeps nothing itself."""

    def __init__(
        self, info: ModelInfo, ledger: KvLedger, scheduler: Scheduler, handoffs: HandoffTable, following: Following
    ) -> None:
        self._info = info
        self._ledger = ledger
        self._scheduler = scheduler
        self._handoffs = handoffs
        self._following = following

    def supply(self, sequence: TokenSequence, grammar: Grammar) -> None:
        """Give a request with a constraint its grammar; one that waited for nothing else waits for its turn now."""
        sequence.grammar = grammar
        if sequence.state is SequenceState.UNREADY:
            self._following.begin(sequence, grammar, ())
            self._scheduler.supply(sequence)

    def open_lease(self, sequence: TokenSequence, observer: PrefillObserver) -> None:
        """Let a prefill that was just admitted be read; what was cached of it can be read now."""
        prompt, table = sequence.num_prompt_tokens, sequence.block_table[: sequence.num_blocks]
        self._handoffs.open_reading(sequence.request_id, table, prompt)
        if sequence.cached_tokens:
            layers = range(self._info.num_layers)
            observer.on_kv_ready(sequence.request_id, layers, range(sequence.cached_tokens))

    def keep(self, sequence: TokenSequence) -> None:
        """Make of a prefill a request that goes on here. Raises as `Engine.keep`; nothing has changed then."""
        if num_blocks(sequence.max_tokens - 1, self._ledger.block_size) > self._ledger.blocks.num_blocks:
            raise RejectedError(RejectReason.TOO_LONG, f"the pool cannot hold {sequence.max_tokens} tokens")
        if not self._handoffs.close_unused(sequence.request_id):
            raise TransferError("in_use", "a prefill that is being copied cannot be kept")
        sequence.is_prefill = False
        sequence.window_queries = None
        if sequence.state is SequenceState.LEASED:
            self._ledger.release(sequence)
            sequence.handle(SequenceEvent.KEPT)
            self._scheduler.requeue(sequence)

    def reserve(self, sequence: TokenSequence) -> Reservation:
        """Take blocks for KV from elsewhere. Raises as `Engine.reserve`; nothing has changed then."""
        if not self._scheduler.can_reserve():
            raise RejectedError(RejectReason.QUEUE_FULL, "the batch has no place left")
        if self._scheduler.is_short_of_blocks():
            raise RejectedError(RejectReason.NO_BLOCKS, "other requests wait for blocks")
        prompt = sequence.num_prompt_tokens
        if not self._ledger.admit(
            sequence,
            num_tokens=prompt + 1,
            max_cached_tokens=prompt,
            headroom=self._scheduler.headroom(),
            owner=Owner.LEASE,
        ):
            raise RejectedError(RejectReason.NO_BLOCKS, f"{self._ledger.num_available} blocks are available")
        self._scheduler.reserve(sequence)
        tokens = range(sequence.cached_tokens, prompt)
        self._handoffs.open_writing(sequence.request_id, sequence.block_table[: sequence.num_blocks], tokens)
        return Reservation(sequence.cached_tokens)

    def activate(
        self, sequence: TokenSequence, first_tokens: Sequence[int], *, exact: bool, num_dropped: int
    ) -> Finish | None:
        """Take a request whose KV has landed into the batch; return how its first tokens end it, if they do.

        Raises as `Engine.activate`; nothing has changed then.
        """
        if not all(0 <= token_id < self._info.vocab_size for token_id in first_tokens):
            raise TransferError("first_token", f"one of {list(first_tokens)} is not in the vocabulary")
        if num_dropped and (exact or self._info.has_sliding_window):
            raise TransferError("dropped_tokens", f"{num_dropped} tokens were left out, and every one is needed")
        self._handoffs.check_complete(sequence.request_id, num_dropped)
        assert first_tokens, "the first token comes from the prefill side"
        assert sequence.has_grammar, "the grammar is supplied first"
        self._handoffs.close(sequence.request_id)
        self._ledger.change_owner(sequence, Owner.REQUEST)
        sequence.handle(SequenceEvent.ACTIVATED)
        self._scheduler.join(sequence)
        sequence.num_computed = sequence.num_prompt_tokens
        sequence.is_shareable = exact
        self._ledger.drop(sequence, num_dropped)
        self._ledger.index(sequence)
        for token_id in first_tokens:
            finish = sequence.push(token_id)
            if finish is not None:
                return finish
        if sequence.grammar is not None:
            self._following.begin(sequence, sequence.grammar, first_tokens)
        return None
