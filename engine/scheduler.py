"""Which requests run, and what each step computes: bookkeeping around the decisions of `engine.policy`.

Continuous batching. First come, first served: requests wait in the order of their arrival and the oldest is admitted
as soon as the blocks for all its known tokens are there; nobody overtakes it. A running request takes further blocks
one at a time while it generates; when there are none, the youngest running request loses its blocks and waits again
at its old place, to be recomputed.
"""

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter

from core.ids import RequestId
from core.membership import LoadReport
from engine.blocks import Owner
from engine.ledger import KvLedger
from engine.policy import admission_headroom, choose_victims, share_budget
from engine.sequence import SequenceEvent, SequenceState, TokenSequence

_BY_ARRIVAL = attrgetter("arrival")


@dataclass(frozen=True, slots=True)
class Admission:
    """A request got into the batch for the first time. `cached_tokens` of its prompt need no computing."""

    request_id: RequestId
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class StepStats:
    """What the last step did."""

    num_prompt_tokens: int = 0
    num_decodes: int = 0
    num_preempted: int = 0
    admitted: tuple[Admission, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
        shares: (sequence, tokens to compute), at least one token each.
        admitted: those among them that were waiting.
        preempted: those that lost their blocks.
    """

    shares: list[tuple[TokenSequence, int]]
    admitted: list[TokenSequence]
    preempted: list[TokenSequence]

    def stats(self) -> StepStats:
        """Return the plan in numbers."""
        num_decodes = sum(sequence.num_generated > 0 and share == 1 for sequence, share in self.shares)
        return StepStats(
            num_prompt_tokens=sum(share for _, share in self.shares) - num_decodes,
            num_decodes=num_decodes,
            num_preempted=len(self.preempted),
            admitted=tuple(
                Admission(sequence.request_id, sequence.cached_tokens)
                for sequence in self.admitted
                if not sequence.num_preemptions
            ),
        )


class Scheduler:
    """The waiting and the running requests, each list oldest first.

    Attributes:
        unready: requests whose grammar is being compiled; they are in nobody's way.
        num_reserved: requests whose KV is on its way; each has a place in the batch kept for it.
        reserved_tokens: of their prompts.
    """

    def __init__(self, ledger: KvLedger, *, max_batch_tokens: int, max_num_requests: int) -> None:
        self._ledger = ledger
        self._max_batch_tokens = max_batch_tokens
        self._max_running = min(max_num_requests, max_batch_tokens)  # so that every decode fits in every step
        self.unready: list[TokenSequence] = []
        self.waiting: list[TokenSequence] = []
        self.running: list[TokenSequence] = []
        self.num_reserved = 0
        self.reserved_tokens = 0
        self._is_short_of_blocks = False

    def add(self, sequence: TokenSequence) -> None:
        """Queue a request, or keep it until its grammar is here."""
        insort(self.unready if sequence.state is SequenceState.UNREADY else self.waiting, sequence, key=_BY_ARRIVAL)

    @property
    def num_queued(self) -> int:
        return len(self.unready) + len(self.waiting)

    def supply(self, sequence: TokenSequence) -> None:
        """Queue a request whose grammar is here, at its old place."""
        self.unready.remove(sequence)
        sequence.handle(SequenceEvent.SUPPLIED)
        self.add(sequence)

    def requeue(self, sequence: TokenSequence) -> None:
        """Let a request wait that was in the batch before; it holds nothing, and its turn comes by its age."""
        sequence.num_preemptions += 1
        self.add(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """Take a request out of the queue or the batch, if it is there; its blocks are the caller's affair."""
        match sequence.state:
            case SequenceState.UNREADY:
                self.unready.remove(sequence)
            case SequenceState.WAITING:
                self.waiting.remove(sequence)
            case SequenceState.RUNNING:
                self.running.remove(sequence)
            case SequenceState.RESERVED:
                self._unreserve(sequence)

    def can_reserve(self) -> bool:
        """Say whether the batch has a place for one more request from elsewhere."""
        return len(self.running) + self.num_reserved < self._max_running

    def reserve(self, sequence: TokenSequence) -> None:
        """Keep a place for a request whose KV is on its way."""
        self.num_reserved += 1
        self.reserved_tokens += sequence.num_prompt_tokens

    def is_short_of_blocks(self) -> bool:
        """Say whether a request that is here already waits for blocks; it goes before anything from elsewhere."""
        return bool(self.waiting) and self._is_short_of_blocks

    def headroom(self) -> int:
        """Return the blocks that must stay available when a request is let in."""
        return admission_headroom(self.num_reserved + sum(not sequence.is_prefill for sequence in self.running))

    def join(self, sequence: TokenSequence) -> None:
        """Put a request whose KV has landed into the batch, at the place that was kept for it."""
        self._unreserve(sequence)
        insort(self.running, sequence, key=_BY_ARRIVAL)

    def schedule(self) -> StepPlan:
        """Decide on the next step, and take and give blocks accordingly."""
        preempted = self._make_room()
        self._is_short_of_blocks = bool(preempted)
        # After a preemption nobody is let in: whatever became free belongs to those that are running.
        admitted = [] if preempted else self._admit()
        pending = [len(sequence.tokens) - sequence.num_computed - sequence.is_held for sequence in self.running]
        shares = share_budget(pending, self._max_batch_tokens)
        return StepPlan(
            [(sequence, share) for sequence, share in zip(self.running, shares, strict=True) if share],
            admitted,
            preempted,
        )

    def load_report(self) -> LoadReport:
        """Return counts."""
        prompts = sum(sequence.num_pending for sequence in self.running if sequence.num_pending > 1)
        return LoadReport(
            num_running=len(self.running),
            num_waiting=self.num_queued + self.num_reserved,
            num_reserved=self.num_reserved,
            reserved_tokens=self.reserved_tokens,
            queued_prefill_tokens=prompts + sum(each.num_pending for each in (*self.unready, *self.waiting)),
            context_tokens=sum(sequence.num_computed - sequence.num_dropped for sequence in self.running),
            free_blocks=self._ledger.num_available,
            total_blocks=self._ledger.blocks.num_blocks,
            cached_blocks=len(self._ledger.cache),
        )

    def check(self, live: Collection[TokenSequence]) -> None:
        """Assert that the lists and the counts are those of all `live` requests."""
        by_state = {state: [each for each in live if each.state is state] for state in SequenceState}
        assert len(self.unready) == len(by_state[SequenceState.UNREADY])
        assert len(self.waiting) == len(by_state[SequenceState.WAITING])
        assert len(self.running) == len(by_state[SequenceState.RUNNING])
        assert all(sequence in live for sequence in (*self.unready, *self.waiting, *self.running))
        reserved = by_state[SequenceState.RESERVED]
        assert self.num_reserved == len(reserved)
        assert self.reserved_tokens == sum(sequence.num_prompt_tokens for sequence in reserved)

    def _unreserve(self, sequence: TokenSequence) -> None:
        self.num_reserved -= 1
        self.reserved_tokens -= sequence.num_prompt_tokens

    def _make_room(self) -> list[TokenSequence]:
        ledger, size = self._ledger, self._ledger.block_size
        growing = [sequence for sequence in self.running if sequence.num_places > sequence.num_blocks * size]
        if not growing:
            return []
        preempted: list[TokenSequence] = []
        missing = [ledger.missing_blocks(sequence) for sequence in self.running]
        if sum(missing) > ledger.num_available:
            held = [ledger.reclaimable(sequence) for sequence in self.running]
            can_yield = [sequence.is_preemptible for sequence in self.running]
            preempted = [self.running[at] for at in choose_victims(missing, held, can_yield, ledger.num_available)]
            for sequence in preempted:
                self._preempt(sequence)
        for sequence in growing:
            if sequence.state is SequenceState.RUNNING:
                ledger.grow(sequence)
        return preempted

    def _preempt(self, sequence: TokenSequence) -> None:
        self.running.remove(sequence)
        self._ledger.release(sequence)
        sequence.is_shareable = True  # whatever it was before, it is recomputed here, exactly
        sequence.handle(SequenceEvent.PREEMPTED)
        self.requeue(sequence)

    def _admit(self) -> list[TokenSequence]:
        admitted = []
        left = self._max_batch_tokens - sum(len(sequence.tokens) - sequence.num_computed for sequence in self.running)
        while self.waiting and left > 0 and self.can_reserve():
            sequence = self.waiting[0]
            num_tokens = len(sequence.tokens)
            if not self._ledger.admit(
                sequence,
                num_tokens=num_tokens,
                max_cached_tokens=sequence.num_reusable,
                headroom=self.headroom(),
                owner=Owner.REQUEST,
            ):
                self._is_short_of_blocks = True
                break
            del self.waiting[0]
            sequence.handle(SequenceEvent.ADMITTED)
            insort(self.running, sequence, key=_BY_ARRIVAL)
            admitted.append(sequence)
            left -= num_tokens - sequence.num_computed
        return admitted
