"""The prefix index: what it says of tiers, predictions, forgotten workers; its cap; its order of eviction."""

import random
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest

from core.blocks import block_hashes
from core.errors import ProtocolError
from core.ids import WorkerId
from core.kv_events import Tier
from router.index.prefix_index import TICK_S, PrefixIndex
from router.index.slots import WorkerSlots

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")
ROOT = b"r" * 16


def chain(*tokens: int) -> tuple[bytes, ...]:
    """Hashes of a prompt of one-token blocks."""
    return block_hashes(tokens, 1, ROOT)


def big() -> PrefixIndex:
    return PrefixIndex(2**20, WorkerSlots())


def of_blocks(num_blocks: int) -> PrefixIndex:
    return PrefixIndex(PrefixIndex.bytes_for(num_blocks), WorkerSlots())


def test_matches_the_leading_blocks_of_each_worker() -> None:
    index = big()
    index.store(A, chain(1, 2, 3, 4))
    index.store(B, chain(1, 2))
    index.store(C, chain(9))
    assert index.match(chain(1, 2, 3, 5)).holders() == {A: 3, B: 2}
    assert index.match(chain(9, 1)).holders() == {C: 1}
    assert index.match(chain(7)).holders() == {}
    assert index.match(()).holders() == {}


def test_blocks_are_by_slot_and_as_long_as_asked_for() -> None:
    slots = WorkerSlots()
    index = PrefixIndex(2**20, slots)
    workers = [WorkerId(f"w{number}") for number in range(100)]
    for number, worker in enumerate(reversed(workers)):
        slots.of(worker)
        index.store(worker, chain(*range(number)))
    blocks = index.match(chain(*range(60))).blocks(Tier.DEVICE, 128)
    assert blocks.dtype == np.int32
    assert blocks.tolist() == [min(number, 60) for number in range(100)] + [0] * 28


def test_what_is_below_a_removed_block_is_gone_for_that_worker_only() -> None:
    index = big()
    hashes = chain(1, 2, 3, 4)
    index.store(A, hashes)
    index.store(B, hashes)
    index.remove(A, [hashes[1]])
    assert index.match(hashes).holders() == {A: 1, B: 4}
    index.remove(B, [hashes[0], b"unknown" + b"-" * 9])
    assert index.match(hashes).holders() == {A: 1}
    assert len(index) == 1
    index.check()


def test_storing_a_block_says_that_all_above_it_are_there() -> None:
    index = big()
    hashes = chain(1, 2, 3, 4)
    index.store(A, hashes[:3])
    index.store(B, hashes[3:], parent=hashes[2])
    assert index.match(hashes).holders() == {A: 3, B: 4}


def test_a_piece_whose_upper_part_is_unknown_counts_when_that_comes_back() -> None:
    index = big()
    hashes = chain(1, 2, 3, 4, 5)
    index.store(A, hashes[3:], parent=hashes[2])
    index.store(B, hashes[3:4], Tier.HOST, parent=hashes[2])
    index.predict(C, hashes[3:], 0.0, 5.0)
    assert index.match(hashes).holders(Tier.HOST) == {}
    index.check()
    index.store(B, hashes[:2])
    assert index.match(hashes).holders() == {B: 2}
    index.predict(B, hashes[:4], 0.0, 5.0)
    assert index.match(hashes).holders() == {A: 5, B: 4, C: 5}
    index.check()
    index.expire(10.0)
    assert index.match(hashes).holders() == {A: 5, B: 2}
    assert index.match(hashes).holders(Tier.HOST) == {A: 5, B: 4}
    index.check()


def test_hashes_that_contradict_their_chain_do_no_harm() -> None:
    index = big()
    a, b, c = chain(1, 2, 3)
    for hashes in ([a, b], [b, a], [a, a], [c, b], [c, a, b, c], [b, c]):
        index.store(A, hashes)
        index.predict(B, hashes, 0.0, 1.0)
        index.check()
    with pytest.raises(ProtocolError, match="16 bytes"):
        index.store(A, [a, b"short"])
    index.expire(2.0)
    index.remove(A, [a, b, c])
    assert len(index) == 0


def test_the_host_tier_is_no_device_and_covers_it() -> None:
    index = big()
    hashes = chain(1, 2, 3, 4)
    index.store(A, hashes, Tier.HOST)
    index.store(A, hashes[:2])
    index.store(B, hashes[:3])
    match = index.match(hashes)
    assert match.holders(Tier.DEVICE) == {A: 2, B: 3}
    assert match.holders(Tier.HOST) == {A: 4, B: 3}
    index.remove(A, hashes[:2])
    assert index.match(hashes).holders(Tier.DEVICE) == {B: 3}
    assert index.match(hashes).holders(Tier.HOST) == {A: 4, B: 3}
    index.remove(A, hashes[2:3], Tier.HOST)
    assert index.match(hashes).holders(Tier.HOST) == {A: 2, B: 3}
    index.check()


def test_a_prediction_counts_at_once_and_lapses_or_comes_true() -> None:
    index = big()
    hashes = chain(1, 2, 3, 4)
    index.predict(A, hashes, 10.0, 1.0)
    index.predict(B, hashes[:3], 10.0, 1.0)
    assert index.match(hashes).holders() == {A: 4, B: 3}
    index.store(A, hashes[:2])
    index.predict(B, hashes[:2], 10.8, 1.0)
    index.expire(11.0 - TICK_S / 4)
    assert index.match(hashes).holders() == {A: 4, B: 3}
    index.expire(11.0)
    assert index.match(hashes).holders() == {A: 2, B: 2}, "the sibling's promise stands"
    index.check()
    index.expire(12.0)
    assert index.match(hashes).holders() == {A: 2}
    assert len(index) == 2
    index.check()


def test_a_prediction_is_withdrawn_as_far_as_it_added_something() -> None:
    index = big()
    hashes = chain(1, 2, 3, 4, 5)
    index.store(A, hashes[:1])
    assert index.predict(A, hashes[:3], 0.0, 5.0) == 1
    assert index.predict(A, hashes, 0.0, 5.0) == 3
    assert index.predict(A, hashes, 0.0, 5.0) == 5, "nothing is new"
    index.withdraw(A, hashes, 3)
    assert index.match(hashes).holders() == {A: 3}
    index.store(A, hashes[:2])
    index.withdraw(A, hashes[:3], 1)
    assert index.match(hashes).holders() == {A: 2}, "what came true stays"
    index.withdraw(B, hashes, 0)
    index.withdraw(A, hashes, 0)
    index.check()
    index.expire(9.0)
    assert index.match(hashes).holders() == {A: 2}
    assert len(index) == 2
    index.check()


def test_predictions_lapse_in_pieces_as_prompts_arrive() -> None:
    index = big()
    bursts = [chain(number, *range(1000)) for number in range(8)]
    for hashes in bursts:
        index.predict(A, hashes, 0.0, 1.0)
    index.observe(chain(77), 0.5)
    assert len(index) == 8 * 1001
    index.observe(chain(77), 5.0)
    assert 1001 <= len(index) < 8 * 1001
    index.check()
    index.observe(chain(77), 5.0)
    assert len(index) == 0


def test_a_forgotten_worker_matches_nothing_at_once_and_is_swept_in_pieces() -> None:
    slots = WorkerSlots()
    index = PrefixIndex(2**20, slots)
    hashes = chain(*range(100))
    index.store(A, hashes)
    index.store(B, hashes[:50])
    index.forget(A)
    assert index.match(hashes).holders() == {B: 50}
    assert len(index) == 100, "bounded time: the entries are still there"
    assert index.sweep(60)
    index.store(A, hashes[:3])  # back before the sweep is over, in its old slot
    assert slots.of(A) == 0
    assert index.match(hashes).holders() == {A: 3, B: 50}
    pieces = 0
    while index.sweep(10):
        pieces += 1
        index.check()
    assert pieces >= 3
    assert len(index) == 50
    assert index.match(hashes).holders() == {A: 3, B: 50}
    index.forget(B)
    slots.release(B)
    assert slots.of(C) == 1
    assert index.match(hashes).holders() == {A: 3}, "the slot is C's, what B held is not"


def test_bits_of_dead_workers_are_used_again() -> None:
    slots = WorkerSlots()
    index = PrefixIndex(2**20, slots)
    for number in range(300):
        worker = WorkerId(f"w{number}")
        index.store(worker, chain(1, number))
        index.forget(worker)
        slots.release(worker)
        while index.sweep(1000):
            pass
    index.check()
    assert len(index) == 0
    assert slots.capacity == 1
    assert len(index.match(()).slot_of_bit) == 1


@pytest.mark.parametrize("seed", range(4))
def test_eviction_is_that_of_a_plain_lru_that_moves_every_block(seed: int) -> None:
    rng = random.Random(seed)
    capacity = 24
    index, plain = of_blocks(capacity), OrderedDict[bytes, None]()
    for _ in range(400):
        hashes = chain(*(rng.randrange(2) for _ in range(rng.randrange(1, 9))))
        expected = next((depth for depth, block in enumerate(hashes) if block not in plain), len(hashes))
        assert index.match(hashes).holders().get(A, 0) == expected
        used = hashes if rng.random() < 0.7 else hashes[:expected]
        if len(used) > expected:
            index.store(A, used)
        for block in reversed(used or hashes[:expected]):
            plain[block] = None
            plain.move_to_end(block)
        while len(plain) > capacity:
            plain.popitem(last=False)
        assert len(index) == len(plain)
        index.check()


def test_a_chain_longer_than_the_index_is_cut_short() -> None:
    index = of_blocks(10)
    index.store(A, chain(*range(25)))
    assert index.match(chain(*range(25))).holders() == {A: 10}
    index.store(B, chain(99))
    assert index.match(chain(*range(25))).holders() == {A: 9}


def test_the_cap_holds_for_real_memory_while_prefixes_churn() -> None:
    cap = 4 * 2**20
    big()  # what is compiled stays
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = PrefixIndex(cap, WorkerSlots())
        peaks = []
        rng = random.Random(0)
        for number in range(1500):
            hashes = tuple(rng.randbytes(16) for _ in range(60))
            worker = WorkerId(f"w{number % 60}")
            index.predict(worker, hashes, number * 0.01, 2.0)
            index.store(worker, hashes[: rng.randrange(1, 61)])
            index.observe(hashes, number * 0.01)
            index.expire(number * 0.01)
            if number % 500 == 499:
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
        del hashes
    finally:
        tracemalloc.stop()
    index.check()
    assert len(index) > 0.9 * index.max_blocks
    assert max(peaks) < cap
    assert index.num_bytes <= cap


def test_many_different_sets_of_holders_stay_under_the_cap_too() -> None:
    cap = 2**20
    index = PrefixIndex(cap, WorkerSlots())
    rng = random.Random(0)
    hashes = chain(*range(8_000))
    workers = [WorkerId(f"w{number}") for number in range(900)]
    for _ in range(3000):
        index.store(rng.choice(workers), hashes[: rng.randrange(1, 8_000)])
    index.check()
    assert index.num_bytes <= cap


def test_runs_are_as_many_as_depths_and_not_as_workers() -> None:
    index = PrefixIndex(32 * 2**20, WorkerSlots())
    hashes = chain(*range(1875))
    for number in range(1000):
        index.store(WorkerId(f"w{number}"), hashes[: 300 * (1 + number % 6)])
    match = index.match(hashes)
    assert len(match.runs) == 6
    assert match.blocks(Tier.DEVICE, 1000).tolist() == [300 * (1 + number % 6) for number in range(1000)]
