"""The dispatcher over workers without sockets: late news, shedding, the end of every request, books that balance."""

import asyncio
import random

import pytest

from core.errors import Aborted, RejectedError, RejectReason, ServingError, WorkerLost
from core.ids import TransferId, WorkerId
from core.membership import LoadReport
from core.request import Finish, FinishReason, TokenOutput
from core.service_class import NO_SLO, ServiceClass
from router import messages as m
from router.forwarding.breaker import BreakerState
from router.forwarding.worker_port import DecodeOrder, PrefillOrder
from router.reading_turns import Bell, ReadingTurns
from router.service_terms import ServiceTerms
from router.stream import Completion, RequestStream
from tests.fakes.worker_port import FakeGateway

END = Finish(FinishReason.LENGTH)
BATCH = ServiceTerms(ServiceClass.BATCH, 0, NO_SLO, "")
REMOTE = {"modes": ["remote_prefill"], "late_binding": False}
LATE = {"modes": ["remote_prefill"], "late_binding": True}


def token(index: int) -> tuple[TokenOutput, ...]:
    return (TokenOutput(index, 7),)


async def read(stream: RequestStream) -> Completion:
    bell = Bell(ReadingTurns())
    stream.wake(bell)
    async with asyncio.timeout(10.0):
        while True:
            await bell.wait()
            _, completion = stream.take()
            if completion is not None:
                return completion


async def turn() -> None:
    """Let what was put off for a moment happen."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_good_life_is_told_once_and_explained() -> None:
    gateway = FakeGateway(routing=REMOTE, num_prefills=1, num_decodes=1)
    ended: list[int] = []
    stream = gateway.submit("r", on_concluded=ended.append)
    [(decode, reservation)] = gateway.workers.sent
    assert isinstance(reservation, DecodeOrder)
    assert gateway.fleet.credit.of(gateway.prefills[0]).prefill_tokens == 16, "counted before it is even asked"
    gateway.tell(decode, reservation.work_id, m.DecodeAccepted(0, LoadReport(sequence=1, num_reserved=1)))
    prefill, prompt = gateway.workers.sent[-1]
    assert isinstance(prompt, PrefillOrder)
    assert prompt.decode is not None
    assert (prompt.decode.worker_id, prompt.work_id) == (decode, reservation.work_id)
    gateway.tell(prefill, prompt.work_id, m.PrefillAccepted(0), m.PrefillProduced(token(0)))
    gateway.tell(prefill, prompt.work_id, m.PrefillMeasured(0.0, 0.1, 0), m.KvHandedOver(1e9, 1e-4, 0))
    landed = m.KvLanded(0.01, 0.02, 0, 16, 16_000, "none", kv_lossless=True, kv_wire_bytes=17_000)
    gateway.tell(decode, prompt.work_id, landed, m.DecodeProduced(token(1) + token(2)))
    assert ended == []
    gateway.tell(decode, prompt.work_id, m.DecodeFinished(token(3), END))
    completion = await read(stream)
    assert (completion.completion_tokens, ended) == (4, [16 + 4])
    [explained] = gateway.dispatcher.placer.explanations.of(stream.request_id)
    assert explained.outcome is not None
    assert (explained.outcome.ttft_s, explained.outcome.transfer_s) == (completion.timing.ttft_s, 0.01)
    assert explained.hindsight() is not None
    await turn()
    gateway.check_books()


async def test_what_comes_from_a_worker_that_holds_nothing_of_the_work_is_dropped() -> None:
    gateway = FakeGateway(routing=LATE, num_prefills=1)
    for sequence, decode in enumerate(gateway.decodes, 1):
        gateway.report(decode, sequence, total_blocks=100, free_blocks=0, num_running=1, context_tokens=400)
    stream = gateway.submit("r")
    [(prefill, prompt)] = gateway.workers.sent
    assert isinstance(prompt, PrefillOrder)
    assert prompt.bind_later
    gateway.tell(prefill, prompt.work_id, m.PrefillAccepted(0))
    first = gateway.workers.sent[-1][0]
    gateway.tell(first, prompt.work_id, m.DecodeLost(WorkerLost("not now")))
    second = gateway.workers.sent[-1][0]
    assert second != first
    gateway.tell(first, prompt.work_id, m.DecodeAccepted(0))
    assert gateway.workers.binds == [], "the late answer of a worker that was given up binds nothing"
    gateway.tell(second, prompt.work_id, m.DecodeAccepted(0))
    assert gateway.workers.binds == [(prefill, prompt.work_id, second)]
    gateway.dispatcher.abandon(stream, Aborted("enough"))
    await turn()
    gateway.check_books()


async def test_kv_that_waits_goes_to_the_next_incarnation_of_decode_workers_that_died_as_they_were_asked() -> None:
    gateway = FakeGateway(routing=LATE, num_prefills=1, retry_min_s=60.0, retry_max_s=60.0)
    for decode in gateway.decodes:
        gateway.report(decode, 1, total_blocks=100, free_blocks=0, num_running=1, context_tokens=400)
    stream = gateway.submit("r")
    [(prefill, prompt)] = gateway.workers.sent
    gateway.tell(prefill, prompt.work_id, m.PrefillAccepted(0), m.PrefillProduced(token(0)))
    for _ in gateway.decodes:
        gateway.lose(gateway.workers.sent[-1][0])
    asked = [worker_id for worker_id, _ in gateway.workers.sent[1:]]
    assert set(asked) == set(gateway.decodes)
    gateway.join(asked[0])
    await turn()
    assert len(gateway.workers.sent) == 3, "it may hold what it was asked for"
    gateway.join(asked[0], epoch=2)
    await turn()
    [(again, reservation)] = gateway.workers.sent[3:]
    assert (again, reservation.work_id) == (asked[0], prompt.work_id)
    gateway.tell(again, prompt.work_id, m.DecodeAccepted(0))
    assert gateway.workers.binds == [(prefill, prompt.work_id, again)]
    gateway.dispatcher.abandon(stream, Aborted("enough"))
    await turn()
    gateway.check_books()


async def test_who_can_wait_is_sent_away_for_who_cannot() -> None:
    gateway = FakeGateway(
        num_prefills=0, num_decodes=0, max_queued_requests=4, admission={"reserved_ratio": 0.0}, retry_min_s=1.0
    )
    ended: list[int] = []
    batch = [gateway.submit(f"b{index}", service=BATCH, on_concluded=ended.append) for index in range(4)]
    gateway.submit("urgent")
    assert ended == [0]
    with pytest.raises(RejectedError) as refused:
        await read(batch[3])
    assert refused.value.reason is RejectReason.SHED, "the newest of the class that can wait"
    with pytest.raises(RejectedError) as full:
        gateway.submit("more", service=BATCH, on_concluded=ended.append)
    assert full.value.reason is RejectReason.QUEUE_FULL
    gateway.dispatcher.close(Aborted("enough"))
    assert ended == [0] * 4, "one that never entered never ends"
    await turn()
    gateway.check_books()


async def test_a_worker_that_does_not_answer_is_left_alone() -> None:
    gateway = FakeGateway(
        routing=REMOTE,
        num_decodes=1,
        workers={"accept_timeout_s": 0.01, "max_losses": 0},
        forwarding={"breaker": {"failures": 2, "open_min_s": 60.0, "open_max_s": 60.0}},
    )
    for name in ("a", "b"):
        with pytest.raises(ServingError):
            await read(gateway.submit(name))
    assert gateway.dispatcher.breakers.state_of(gateway.decodes[0], 0.0)[0] is BreakerState.OPEN
    gateway.join(gateway.decodes[0], epoch=2)
    assert list(gateway.dispatcher.breakers.not_closed()) == [], "another incarnation is trusted"
    await turn()
    gateway.check_books()


async def test_a_request_that_is_refused_asks_some_of_a_large_cluster_and_waits() -> None:
    gateway = FakeGateway(
        routing=REMOTE,
        num_prefills=40,
        num_decodes=1,
        forwarding={"max_refusals": 5},
        retry_min_s=60.0,
        retry_max_s=60.0,
    )
    gateway.submit("r")
    [(decode, reservation)] = gateway.workers.sent
    gateway.tell(decode, reservation.work_id, m.DecodeAccepted(0))
    while prompts := gateway.orders_at(lambda worker_id: worker_id.startswith("p")):
        [(prefill, prompt)] = prompts
        del gateway.workers.orders[prefill, prompt.work_id]
        gateway.tell(prefill, prompt.work_id, m.PrefillRejected(RejectedError(RejectReason.QUEUE_FULL)))
    assert len({worker_id for worker_id, _ in gateway.workers.sent}) == 1 + 5
    assert gateway.workers.aborts == [(decode, reservation.work_id)]
    assert gateway.dispatcher.num_queued == 1, "it keeps its place"
    gateway.dispatcher.close(Aborted("enough"))
    await turn()
    gateway.check_books()


async def test_a_late_bound_prompt_that_is_refused_asks_some_of_a_large_pool_and_waits() -> None:
    gateway = FakeGateway(
        routing=LATE, num_prefills=1, num_decodes=40, forwarding={"max_refusals": 5}, retry_min_s=60.0, retry_max_s=60.0
    )
    for sequence, decode in enumerate(gateway.decodes, 1):
        gateway.report(decode, sequence, total_blocks=100, free_blocks=0, num_running=1, context_tokens=400)
    gateway.submit("r")
    [(prefill, prompt)] = gateway.workers.sent
    gateway.tell(prefill, prompt.work_id, m.PrefillAccepted(0))
    while asked := gateway.orders_at(lambda worker_id: worker_id.startswith("d")):
        [(decode, reservation)] = asked
        del gateway.workers.orders[decode, reservation.work_id]
        gateway.tell(decode, reservation.work_id, m.DecodeRejected(RejectedError(RejectReason.NO_BLOCKS)))
    assert len(gateway.workers.sent) == 1 + 5
    gateway.dispatcher.close(Aborted("enough"))
    await turn()
    gateway.check_books()


async def test_a_late_bound_prompt_asks_again_when_there_may_be_room_and_not_at_every_report() -> None:
    gateway = FakeGateway(routing=LATE, num_prefills=1, num_decodes=2, retry_min_s=60.0, retry_max_s=60.0)
    full = {"total_blocks": 100, "free_blocks": 0, "num_running": 2, "context_tokens": 400}
    for decode in gateway.decodes:
        gateway.report(decode, 1, **full)
    gateway.submit("r")
    [(prefill, prompt)] = gateway.workers.sent
    gateway.tell(prefill, prompt.work_id, m.PrefillAccepted(0))
    refused = m.DecodeRejected(RejectedError(RejectReason.NO_BLOCKS), LoadReport(sequence=2, **full))

    async def refuse_all() -> None:
        while asked := gateway.orders_at(lambda worker_id: worker_id.startswith("d")):
            [(decode, reservation)] = asked
            del gateway.workers.orders[decode, reservation.work_id]
            gateway.tell(decode, reservation.work_id, refused)
            await turn()

    await refuse_all()
    gateway.submit("next")
    await turn()
    later = gateway.workers.sent[-1][1]
    gateway.tell(prefill, later.work_id, m.PrefillAccepted(0))
    await refuse_all()
    gateway.submit("unanswered")
    await turn()
    assert isinstance(gateway.workers.sent[-1][1], PrefillOrder), "one more request is no room"
    num_sent = len(gateway.workers.sent)
    for sequence in range(3, 10):
        gateway.report(prefill, sequence, free_blocks=sequence)
        gateway.report(gateway.decodes[0], sequence, **{**full, "context_tokens": 400 + sequence})
        await turn()
    assert len(gateway.workers.sent) == num_sent, "nothing was freed"
    gateway.report(gateway.decodes[0], 10, **{**full, "num_running": 1, "free_blocks": 50})
    await turn()
    [(decode, reservation)] = gateway.workers.sent[num_sent:]
    assert (decode, reservation.work_id) == (gateway.decodes[0], prompt.work_id)
    gateway.tell(decode, reservation.work_id, m.DecodeAccepted(0))
    await turn()
    assert gateway.workers.sent[-1][1].work_id == later.work_id, "who finds a place leaves the next one to look"
    gateway.dispatcher.close(Aborted("enough"))
    await turn()
    gateway.check_books()


async def test_a_trip_that_another_gateway_saw_ends_here_without_its_word() -> None:
    gateway = FakeGateway()
    breakers, rested = gateway.dispatcher.breakers, asyncio.Event()
    breakers.on_changed = lambda _: rested.set()
    breakers.adopt(gateway.prefills[0], BreakerState.OPEN, 0.01, gateway.clock.now())
    async with asyncio.timeout(5.0):
        await rested.wait()
    assert breakers.state_of(gateway.prefills[0], 0.0)[0] is BreakerState.HALF_OPEN
    gateway.check_books()


class RandomWorkers:
    """Answers orders at random, in any way that the contract allows, until nothing is left to answer."""

    def __init__(self, gateway: FakeGateway, rng: random.Random) -> None:
        self.gateway = gateway
        self.rng = rng
        self.sequence = 0
        self.progress: dict[tuple[WorkerId, TransferId], int] = {}
        self.landed: set[TransferId] = set()

    def step(self) -> None:
        orders = self.gateway.orders_at()
        if not orders:
            return
        worker_id, order = self.rng.choice(orders)
        key = (worker_id, order.work_id)
        stage = self.progress.get(key, 0)
        if stage == 0:
            self.answer(worker_id, order)
        elif self.rng.random() < 0.02:
            self.drop(key)
            lost = m.PrefillLost if isinstance(order, PrefillOrder) else m.DecodeLost
            self.gateway.tell(worker_id, order.work_id, lost(WorkerLost("engine")))
        elif isinstance(order, PrefillOrder):
            self.prefill(worker_id, order, stage)
        else:
            self.decode(worker_id, order, stage)

    def answer(self, worker_id: WorkerId, order: PrefillOrder | DecodeOrder) -> None:
        self.sequence += 1
        load = LoadReport(sequence=self.sequence, queued_prefill_tokens=self.rng.randrange(64), num_running=1)
        is_prefill = isinstance(order, PrefillOrder)
        if self.rng.random() < 0.25:
            self.drop((worker_id, order.work_id))
            error = RejectedError(self.rng.choice([RejectReason.BUSIER, RejectReason.NO_BLOCKS]))
            event: m.Event = m.PrefillRejected(error, load) if is_prefill else m.DecodeRejected(error, load)
        else:
            self.progress[worker_id, order.work_id] = 1
            event = m.PrefillAccepted(0, load) if is_prefill else m.DecodeAccepted(0, load)
        self.gateway.tell(worker_id, order.work_id, event)

    def prefill(self, worker_id: WorkerId, order: PrefillOrder, stage: int) -> None:
        key, tell = (worker_id, order.work_id), self.gateway.tell
        last = order.request.sampling.max_tokens - 1
        bound = next((decode for who, work, decode in self.gateway.workers.binds if (who, work) == key), "")
        is_alone = order.decode is None and (not order.bind_later or bound is None)
        if stage == 1:
            self.progress[key] = 2
            if last == 0:
                self.drop(key)
                tell(worker_id, order.work_id, m.PrefillFinished(token(0), END))
                return
            tell(worker_id, order.work_id, m.PrefillProduced(token(0)), m.PrefillMeasured(0.0, 0.01, 0))
        elif is_alone:
            self.generate(worker_id, order, stage, m.PrefillProduced, m.PrefillFinished)
        elif order.decode is not None or bound:
            self.drop(key)
            self.landed.add(order.work_id)
            tell(worker_id, order.work_id, m.KvHandedOver())

    def decode(self, worker_id: WorkerId, order: DecodeOrder, stage: int) -> None:
        if order.generate and stage == 1:
            self.progress[worker_id, order.work_id] = 2
            self.gateway.tell(worker_id, order.work_id, m.DecodeProduced(token(0)))
        elif not order.generate and stage == 1:
            if order.work_id in self.landed:
                self.progress[worker_id, order.work_id] = 2
                landed = m.KvLanded(0.0, 0.0, 0, 16, 16_000, "none", kv_lossless=True, kv_wire_bytes=16_000)
                self.gateway.tell(worker_id, order.work_id, landed)
        else:
            self.generate(worker_id, order, stage, m.DecodeProduced, m.DecodeFinished)

    def generate(
        self,
        worker_id: WorkerId,
        order: PrefillOrder | DecodeOrder,
        stage: int,
        produced: type[m.PrefillProduced] | type[m.DecodeProduced],
        finished: type[m.PrefillFinished] | type[m.DecodeFinished],
    ) -> None:
        """The token after those that `stage` counts."""
        index, last = stage - 1, order.request.sampling.max_tokens - 1
        self.progress[worker_id, order.work_id] = stage + 1
        if index == last:
            self.drop((worker_id, order.work_id))
            self.gateway.tell(worker_id, order.work_id, finished(token(index), END))
        else:
            self.gateway.tell(worker_id, order.work_id, produced(token(index)))

    def drop(self, key: tuple[WorkerId, TransferId]) -> None:
        self.progress.pop(key, None)
        self.gateway.workers.orders.pop(key, None)


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_workers_answer_every_request_ends_and_the_books_balance(seed: int) -> None:
    rng = random.Random(seed)
    modes = [["remote_prefill"], ["remote_prefill", "local_prefill", "colocated"], ["colocated"]][seed % 3]
    gateway = FakeGateway(
        num_prefills=3,
        num_decodes=3,
        seed=seed,
        routing={"modes": modes},
        workers={"hold_timeout_s": 0.02, "max_losses": 1},
        forwarding={"max_late_bound": 4, "breaker": {"failures": 2, "open_min_s": 0.002}},
    )
    workers = RandomWorkers(gateway, rng)
    ended: list[int] = []
    reads = []
    for index in range(40):
        if gateway.decodes and rng.random() < 0.3:  # no room, as far as is told
            workers.sequence += 1
            full = {"total_blocks": 100, "free_blocks": rng.choice([0, 90]), "num_running": 1, "context_tokens": 40}
            gateway.report(rng.choice(gateway.decodes), workers.sequence, **full)
        stream = gateway.submit(f"r{index}", max_tokens=rng.choice([1, 2, 5]), on_concluded=ended.append)
        reads.append(asyncio.create_task(read(stream)))
        for _ in range(rng.randrange(20)):
            workers.step()
        if rng.random() < 0.1:
            gateway.dispatcher.abandon(stream, Aborted("left"))
        if rng.random() < 0.05:
            loser = rng.choice([*gateway.prefills, *gateway.decodes])
            gateway.lose(loser)
            gateway.join(loser, epoch=2 + index)
        await asyncio.sleep(0)
    async with asyncio.timeout(20.0):
        while not await gateway.dispatcher.wait_idle(0.0):
            for _ in range(50):
                workers.step()
            await asyncio.sleep(0.0005)
    outcomes = await asyncio.gather(*reads, return_exceptions=True)
    assert len(ended) == 40
    assert all(isinstance(one, Completion | ServingError) for one in outcomes), outcomes
    assert sum(isinstance(one, Completion) for one in outcomes) > 15
    assert not any("protocol" in str(one) for one in outcomes)
    await turn()
    gateway.check_books()
