"""Slots of workers, and the bits that the index has beside them."""

import pytest

from core.ids import WorkerId
from router.index.bits import IndexBits
from router.index.slots import WorkerSlots

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def test_a_worker_keeps_its_slot_until_it_is_released_and_the_lowest_free_one_is_next() -> None:
    slots = WorkerSlots()
    assert [slots.of(worker) for worker in (A, B, C, A)] == [0, 1, 2, 0]
    version = slots.version
    slots.release(B)
    slots.release(A)
    slots.release(A)
    assert slots.version == version + 2
    assert (slots.find(A), slots.worker(0), slots.worker(2), slots.worker(99)) == (None, None, C, None)
    assert slots.of(B) == 0
    assert (len(slots), slots.capacity) == (2, 3)
    slots.check()


def test_a_bit_is_free_again_only_after_a_sweep_that_began_after_its_worker_was_forgotten() -> None:
    bits = IndexBits(WorkerSlots())
    assert (bits.of(A), bits.of(B)) == (0, 1)
    bits.retire(A)
    assert bits.begin_sweep() == 0b01
    bits.retire(B)
    assert bits.begin_sweep() == 0b01, "one sweep at a time"
    assert bits.of(C) == 2
    bits.end_sweep()
    bits.check()
    assert bits.of(A) == 0, "the first sweep took it out everywhere"
    assert bits.begin_sweep() == 0b10
    bits.end_sweep()
    assert not bits.has_retired
    bits.check()


@pytest.mark.parametrize("is_released", [False, True])
def test_a_worker_without_a_slot_is_not_live(is_released: bool) -> None:
    slots = WorkerSlots()
    bits = IndexBits(slots)
    bits.of(A)
    bits.of(B)
    if is_released:
        slots.release(A)
    assert bits.live == (0b10 if is_released else 0b11)
    assert bits.slot_of_bit[1] == 1
    slots.of(C)
    assert bits.live == (0b10 if is_released else 0b11), "C has A's slot and none of its bits"
