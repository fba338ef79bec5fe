"""A simulated worker of either role: takes orders as the real ones do, and answers with the router's own events.

What is real: the answers (`simulator.answers`), the order of reports, and what load and KV events tell. What is a
model: time (`simulator.engine`), the link, and memory. A request's blocks are reserved for its prompt and its whole
output at once: nothing is preempted, and a worker without room says so before it begins.

1. A prefill worker accepts, computes in chunks, tells the first token, and sends the KV where it was told, before or
   after that; or, told so, generates the rest itself.
2. A decode worker reserves, gets the KV, joins it to its batch, tells the tokens.
3. Either generates all of a request when there is nowhere to hand it over to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core.alarm import Pacer
from core.blocks import num_blocks
from core.errors import WorkerLost
from core.ids import TransferId, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored, KvEvent, KvEventBatch
from core.membership import LoadReport, WorkerRecord
from core.request import Finish, FinishReason, GenerateRequest, TokenOutput
from router import messages as m
from router.forwarding.worker_port import DecodeOrder, PrefillOrder
from simulator.answers import WorkerTerms, decode_refusal, no_blocks, prompt_refusal
from simulator.engine import DecodeSequence, Engine, Gaps, PromptJob
from simulator.hand_off import HandOff
from simulator.kv_pool import KvLease, KvPool
from simulator.machines import Machine
from simulator.virtual_time import VirtualLoop
from simulator.wire import KvLink, Wire

MAX_OUTPUT_TOKENS = 16_384
_TOKENS = tuple(TokenOutput(index, 0) for index in range(MAX_OUTPUT_TOKENS))
_END = Finish(FinishReason.STOP)

Say = m.WorkEvents | LoadReport


@dataclass(slots=True, eq=False)
class _Work:
    order: PrefillOrder | DecodeOrder
    say: Wire[Say]
    lease: KvLease
    num_output_tokens: int
    accepted_at: float
    job: PromptJob | None = None
    sequence: DecodeSequence | None = None
    hand_off: HandOff | None = None  # None: all of it is generated here
    receiver: WorkerId | None = None
    computes_from: float = 0.0
    cached_tokens: int = 0
    first_token_at: float | None = None

    @property
    def work_id(self) -> TransferId:
        return self.order.work_id

    @property
    def request(self) -> GenerateRequest:
        return self.order.request


class SimulatedWorker:
    """One worker.

    Args:
        output_tokens: how many tokens the model will produce for a request: the truth that nobody else knows.
        on_gaps: told of a request's gaps between tokens, from its first token on, when it ends here.
        on_cache: told what the prefix cache gained and lost.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        record: WorkerRecord,
        machine: Machine,
        terms: WorkerTerms,
        *,
        output_tokens: Callable[[str], int],
        on_gaps: Callable[[str, Gaps], None],
        on_cache: Callable[[KvEventBatch], None],
    ) -> None:
        self.record = record
        self.machine = machine
        self.pool = KvPool(
            machine.kv_tokens // record.block_size,
            on_stored=lambda parent, stored: self._tell_cache(BlocksStored(parent, stored)),
            on_removed=lambda removed: self._tell_cache(BlocksRemoved(removed)),
        )
        self.engine = Engine(
            loop,
            machine.prefill,
            machine.decode,
            chunk_tokens=machine.chunk_tokens,
            max_batch=machine.max_batch,
            on_step=self._changed,
        )
        self._loop = loop
        self._terms = terms
        self._output_tokens = output_tokens
        self._on_gaps = on_gaps
        self._on_cache = on_cache
        self._num_batches = 0
        self._link = KvLink(machine.link)
        self._works: dict[str, _Work] = {}
        self._reserved_tokens: dict[str, int] = {}  # prompts of works whose KV has not landed
        self._sequence = 0
        self._listeners: list[Wire[Say]] = []
        self._peers: Mapping[WorkerId, SimulatedWorker] = {}
        self._pacer = Pacer(loop, terms.report_interval_s, self._report)

    @property
    def worker_id(self) -> WorkerId:
        return self.record.worker_id

    @property
    def num_held(self) -> int:
        """Requests that hold something here."""
        return len(self._works)

    def connect(self, listener: Wire[Say], peers: "Mapping[WorkerId, SimulatedWorker]") -> None:
        """Report to one more gateway."""
        self._listeners.append(listener)
        self._peers = peers

    def start(self, phase: float) -> None:
        """Begin to report, the first time after this fraction of a heartbeat."""
        self._loop.call_later(phase * self._terms.heartbeat_s, self._beat)

    # --- orders ---

    def submit_prefill(self, order: PrefillOrder, say: Wire[Say]) -> None:
        """Accept or reject, by a report."""
        hands_over = order.decode is not None or order.bind_later
        refusal = prompt_refusal(order, self.record, self._terms, self.engine, self.pool, self.num_held)
        work = self._take(order, say, with_output=not hands_over) if refusal is None else None
        if work is None:
            error = refusal or no_blocks(self.engine)
            say.send([(order.work_id, m.PrefillRejected(error, load=self._load_of_answer()))])
            return
        if hands_over:
            num_tokens, per_token = order.request.num_prompt_tokens, self.machine.kv_bytes_per_token
            work.hand_off = HandOff(
                self._loop, self._link, per_token, num_tokens, lambda sent: self._landed(work, sent)
            )
            if order.decode is not None:
                self._bind(work, order.decode.worker_id)
        self._compute(work)
        say.send([(order.work_id, m.PrefillAccepted(self._held_tokens(work), load=self._load_of_answer()))])

    def submit_decode(self, order: DecodeOrder, say: Wire[Say]) -> None:
        """Accept or reject, by a report."""
        refusal = decode_refusal(order, self.record, self._terms, self.engine, self.pool, self.num_held)
        work = self._take(order, say, with_output=True) if refusal is None else None
        if work is None:
            error = refusal or no_blocks(self.engine)
            say.send([(order.work_id, m.DecodeRejected(error, load=self._load_of_answer()))])
            return
        if order.generate:
            self._compute(work)
        else:
            self._reserved_tokens[order.work_id] = order.request.num_prompt_tokens
            self._changed()
        say.send([(order.work_id, m.DecodeAccepted(self._held_tokens(work), load=self._load_of_answer()))])

    def bind(self, work_id: TransferId, decode: WorkerId | None) -> None:
        """Tell where the KV of a prompt goes; None: the rest is generated here."""
        work = self._works.get(work_id)
        if work is None or work.hand_off is None or work.hand_off.is_bound:
            return
        if decode is not None:
            self._bind(work, decode)
            return
        work.hand_off.abandon()
        work.hand_off = None
        if not self.pool.grow(work.lease, num_blocks(work.num_output_tokens, self.record.block_size)):
            lost = WorkerLost("no blocks for the output of a prompt that nobody took over")
            work.say.send([(work_id, m.PrefillLost(lost))])
            self.abort(work_id)
        elif work.first_token_at is not None:
            self._decode(work, work.first_token_at)

    def abort(self, work_id: TransferId) -> None:
        """Free everything of a work."""
        work = self._works.get(work_id)
        if work is None:
            return
        if work.job is not None:
            self.engine.remove_prompt(work.job)
        if work.sequence is not None:
            self.engine.remove_sequence(work.sequence)
        if work.hand_off is not None:
            work.hand_off.abandon()
        self._free(work)

    # --- work ---

    def _take(self, order: PrefillOrder | DecodeOrder, say: Wire[Say], *, with_output: bool) -> _Work | None:
        """Reserve the blocks and keep the work; None when they do not fit."""
        request = order.request
        num_output = min(self._output_tokens(request.request_id), request.sampling.max_tokens, MAX_OUTPUT_TOKENS)
        num_tokens = request.num_prompt_tokens + (num_output if with_output else 1)
        lease = self.pool.lease(order.block_hashes, num_blocks(num_tokens, self.record.block_size))
        if lease is None:
            return None
        work = self._works[order.work_id] = _Work(order, say, lease, num_output, self._loop.now())
        return work

    def _free(self, work: _Work) -> None:
        del self._works[work.work_id]
        self._reserved_tokens.pop(work.work_id, None)
        self.pool.release(work.lease)
        self._changed()

    def _held_tokens(self, work: _Work) -> int:
        """Leading tokens of its prompt that are cached here; at least one is left to compute."""
        return min(work.lease.num_pinned * self.record.block_size, work.request.num_prompt_tokens - 1)

    def _compute(self, work: _Work) -> None:
        """Queue the prompt."""
        num_tokens = work.request.num_prompt_tokens

        def start() -> tuple[int, int]:
            work.computes_from = self._loop.now()
            self.pool.match_again(work.lease)
            work.cached_tokens = self._held_tokens(work)
            if work.hand_off is not None:
                work.hand_off.ready(work.cached_tokens, work.computes_from)
            return num_tokens - work.cached_tokens, work.cached_tokens

        def computed(tokens: int, started_at: float) -> None:
            assert work.job is not None
            if work.hand_off is not None:
                work.hand_off.ready(work.job.before, started_at)

        work.job = PromptJob(start, computed, lambda: self._computed(work), num_tokens - self._held_tokens(work))
        self.engine.add_prompt(work.job)
        self._changed()

    def _computed(self, work: _Work) -> None:
        """The prompt is computed, and so is the first token."""
        now = work.first_token_at = self._loop.now()
        work.job = None
        self.pool.commit(work.lease)
        is_decode = isinstance(work.order, DecodeOrder)
        measured = m.PrefillMeasured(
            work.computes_from - work.accepted_at, now - work.computes_from, work.cached_tokens
        )
        if work.num_output_tokens == 1:
            done = m.DecodeFinished if is_decode else m.PrefillFinished
            work.say.send([(work.work_id, measured), (work.work_id, done(_TOKENS[:1], _END))])
            self._on_gaps(work.request.request_id, ())
            self.abort(work.work_id)
            return
        made = m.DecodeProduced if is_decode else m.PrefillProduced
        work.say.send([(work.work_id, measured), (work.work_id, made(_TOKENS[:1]))])
        if work.hand_off is None:
            self._decode(work, now)

    def _decode(self, work: _Work, first_token_at: float) -> None:
        """Join the batch at the next boundary."""
        joined_at = 0.0

        def joined(first_step_s: float) -> None:
            nonlocal joined_at
            joined_at = self._loop.now()

        def ended(gaps: Gaps) -> None:
            (step_s, count), *rest = gaps
            first = (joined_at - first_token_at + step_s, 1)  # the hand-off is in it
            self._on_gaps(work.request.request_id, (first, *([(step_s, count - 1)] if count > 1 else []), *rest))
            done = m.DecodeFinished if isinstance(work.order, DecodeOrder) else m.PrefillFinished
            work.say.send([(work.work_id, done(_TOKENS[1 : work.num_output_tokens], _END))])
            self._free(work)

        context_tokens = work.request.num_prompt_tokens + 1
        work.sequence = DecodeSequence(context_tokens, work.num_output_tokens - 1, ended, joined)
        self.engine.add_sequence(work.sequence)
        self._changed()

    # --- the transfer ---

    def _bind(self, work: _Work, decode: WorkerId) -> None:
        assert work.hand_off is not None
        work.receiver = decode
        receiver = self._peers[decode]
        work.hand_off.bind(receiver.reserved_from(work.work_id), self._bytes_per_s(receiver.record))

    def _bytes_per_s(self, receiver: WorkerRecord) -> float:
        link = self.machine.link
        return link.bytes_per_s if receiver.rack == self.record.rack else link.far_bytes_per_s

    def reserved_from(self, work_id: TransferId) -> int:
        """Return how many leading tokens of a reserved prompt are held here already."""
        work = self._works.get(work_id)
        return self._held_tokens(work) if work is not None else 0

    def _landed(self, work: _Work, sent_bytes: int) -> None:
        """All of the prompt is at the decode worker."""
        assert work.receiver is not None
        assert work.first_token_at is not None
        self._peers[work.receiver].land(work.work_id, sent_bytes, work.first_token_at)
        bytes_per_s = self._bytes_per_s(self._peers[work.receiver].record)
        queued_bytes = int(self._link.queued_s(self._loop.now()) * bytes_per_s)
        handed_over = m.KvHandedOver(bytes_per_s, self.machine.link.message_s, queued_bytes)
        work.say.send([(work.work_id, handed_over)])
        self._free(work)

    def land(self, work_id: TransferId, sent_bytes: int, first_token_at: float) -> None:
        """The KV of a reserved prompt is here. Nothing to do when it was aborted meanwhile."""
        work = self._works.get(work_id)
        if work is None:
            return
        del self._reserved_tokens[work_id]
        self.pool.commit(work.lease)
        sent_tokens = sent_bytes // self.machine.kv_bytes_per_token
        landed = m.KvLanded(
            exposed_s=max(0.0, self._loop.now() - first_token_at),
            first_decode_s=self.engine.last_step_s,
            kv_tokens_held=work.request.num_prompt_tokens - sent_tokens,
            kv_tokens_sent=sent_tokens,
            kv_bytes=sent_bytes,
            kv_profile="none",
            kv_lossless=True,
            kv_wire_bytes=sent_bytes,
        )
        work.say.send([(work_id, landed)])
        self._decode(work, first_token_at)

    # --- reports ---

    def _load(self) -> LoadReport:
        self._sequence += 1
        engine = self.engine
        reserved = self._reserved_tokens if self._terms.reports_reserved else {}
        return LoadReport(
            sequence=self._sequence,
            num_running=engine.num_running,
            num_waiting=engine.num_joining + engine.num_prompts + len(reserved),
            queued_prefill_tokens=engine.queued_tokens,
            context_tokens=engine.context_tokens,
            free_blocks=self.pool.free_blocks,
            total_blocks=self.pool.total_blocks,
            cached_blocks=self.pool.cached_blocks,
            num_reserved=len(reserved),
            reserved_tokens=sum(reserved.values()),
            prefill_tokens_per_s=engine.prefill_tokens_per_s,
            decode_step_s=engine.last_step_s,
        )

    def _load_of_answer(self) -> LoadReport | None:
        return self._load() if self._terms.reports_changes else None

    def _report(self) -> None:
        load = self._load()
        for listener in self._listeners:
            listener.send(load)

    def _tell_cache(self, event: KvEvent) -> None:
        self._num_batches += 1
        self._on_cache(KvEventBatch(self.worker_id, self.record.epoch, self._num_batches, (event,)))

    def _changed(self) -> None:
        if self._terms.reports_changes:
            self._pacer.ask()

    def _beat(self) -> None:
        self._report()
        self._loop.call_later(self._terms.heartbeat_s, self._beat)
