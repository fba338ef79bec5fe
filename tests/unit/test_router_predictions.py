"""What is expected of a worker's cache ends with the work that it was expected of; siblings keep what they need."""

import asyncio
import random
from collections.abc import Sequence

import pytest

from core.blocks import block_hashes
from core.errors import Aborted, RejectedError, RejectReason
from core.ids import TransferId, WorkerId
from core.membership import LoadReport
from router import messages as m
from router.forwarding.predictions import Predictions
from router.forwarding.worker_port import PrefillOrder
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots
from tests.fakes.worker_port import FakeGateway

W = WorkerId("w")
REMOTE = {"modes": ["remote_prefill"], "late_binding": False, "temperature": 0.0}


def chain(*tokens: int) -> tuple[bytes, ...]:
    return block_hashes(tokens, 1, b"r" * 16)


def held(index: PrefixIndex, hashes: Sequence[bytes]) -> int:
    return index.match(hashes).holders().get(W, 0)


def test_the_last_of_several_siblings_takes_back_what_the_first_added() -> None:
    index = PrefixIndex(2**20, WorkerSlots())
    predictions = Predictions(index, 10.0)
    first, second, third = chain(1, 2, 3, 4), chain(1, 2, 3, 5), chain(1, 9)
    for name, hashes in zip("abc", (first, second, third), strict=True):
        predictions.sent(W, name, hashes, 0.0)
    predictions.withdrawn(W, "a")
    assert [held(index, hashes) for hashes in (first, second, third)] == [3, 4, 2]
    predictions.withdrawn(W, "b")
    assert [held(index, hashes) for hashes in (first, second, third)] == [1, 1, 2]
    predictions.withdrawn(W, "c")
    assert (len(index), len(predictions)) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_predicted_is_what_the_works_on_their_way_need(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex(2**20, WorkerSlots())
    predictions = Predictions(index, 10.0)
    pool = [chain(*(rng.randrange(2) for _ in range(rng.randrange(1, 6)))) for _ in range(8)]
    on_way: dict[str, tuple[bytes, ...]] = {}
    true: set[bytes] = set()
    for number in range(60):
        if on_way and rng.random() < 0.5:
            name = rng.choice(list(on_way))
            hashes = on_way.pop(name)
            if rng.random() < 0.3:
                index.store(W, hashes)
                predictions.came_true(W, name)
                true.update(hashes)
            predictions.withdrawn(W, name)
        else:
            on_way[str(number)] = hashes = rng.choice(pool)
            predictions.sent(W, str(number), hashes, 0.0)
        expected = true.union(*on_way.values())
        for hashes in pool:
            assert held(index, hashes) == sum(block in expected for block in hashes)
        index.check()


async def test_a_worker_that_said_it_is_busier_is_not_asked_again_for_what_it_never_got() -> None:
    gateway = FakeGateway(routing=REMOTE, num_prefills=2, num_decodes=1)
    gateway.submit("r", num_tokens=400)
    [(decode, reservation)] = gateway.workers.sent
    gateway.tell(decode, reservation.work_id, m.DecodeAccepted(0))
    busy, prompt = gateway.workers.sent[-1]
    assert isinstance(prompt, PrefillOrder)
    load = LoadReport(sequence=1, queued_prefill_tokens=200)  # less than computing the whole prompt elsewhere
    gateway.tell(busy, prompt.work_id, m.PrefillRejected(RejectedError(RejectReason.BUSIER, "busier", 0.0), load))
    other, again = gateway.workers.sent[-1]
    assert other != busy
    assert isinstance(again, PrefillOrder)
    assert again.cached_tokens == 0
    assert set(gateway.fleet.index.match(prompt.block_hashes).holders()) == {decode, other}
    gateway.dispatcher.close(Aborted("enough"))
    assert len(gateway.fleet.index) == 0, "nobody has computed anything"
    await asyncio.sleep(0)
    gateway.check_books()


async def test_siblings_of_one_turn_follow_the_first_until_it_is_refused() -> None:
    gateway = FakeGateway(routing=REMOTE, num_prefills=2, num_decodes=1)
    for name in ("a", "b"):
        gateway.submit(name, num_tokens=400)
    [(decode, first), (_, second)] = gateway.workers.sent
    for reservation in (first, second):
        gateway.tell(decode, reservation.work_id, m.DecodeAccepted(0))
    asked: dict[TransferId, tuple[WorkerId, PrefillOrder]] = {
        order.work_id: (worker_id, order)
        for worker_id, order in gateway.workers.sent
        if isinstance(order, PrefillOrder)
    }
    worker_id, leader = asked[first.work_id]
    assert asked[second.work_id][0] == worker_id
    assert (leader.cached_tokens, asked[second.work_id][1].cached_tokens) == (0, 399)
    full = RejectedError(RejectReason.QUEUE_FULL, "full", 0.0)
    gateway.tell(worker_id, first.work_id, m.PrefillRejected(full))
    assert gateway.fleet.index.match(leader.block_hashes).holders()[worker_id] == 100, "the sibling is on its way still"
    gateway.tell(worker_id, second.work_id, m.PrefillRejected(full))
    assert worker_id not in gateway.fleet.index.match(leader.block_hashes).holders()
    gateway.dispatcher.close(Aborted("enough"))
    await asyncio.sleep(0)
    gateway.check_books()
