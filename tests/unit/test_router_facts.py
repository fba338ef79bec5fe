"""What a gateway keeps about workers between decisions: records, prompt hashes; and streams."""

import asyncio

import pytest

from core.blocks import block_hashes, hash_namespace
from core.errors import Aborted
from core.ids import Epoch, RequestId, WorkerId
from core.membership import LoadReport, Role, WorkerRecord, WorkerState
from core.request import Finish, FinishReason, TokenOutput
from router.broadcast import Broadcast
from router.prompt_hashes import HashKey, PromptHashes
from router.reading_turns import Bell, ReadingTurns
from router.record_book import RecordBook
from router.routing.modes import Mode, ModeReason
from router.stream import Completion, Placement, RequestStream
from router.timeline import Timeline

A, B = WorkerId("a"), WorkerId("b")


def record(name: str = "a", epoch: int = 1, state: WorkerState = WorkerState.READY, running: int = 0) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(name),
        role=Role.PREFILL,
        epoch=Epoch(epoch),
        state=state,
        load=LoadReport(num_running=running),
    )


def test_records_change_when_more_than_load_changes() -> None:
    book = RecordBook(forget_after_s=3.0)
    assert book.absorb([record()], 0.0)
    assert not book.absorb([record(running=9)], 1.0)
    assert book.records[A].load.num_running == 9
    assert book.absorb([record(state=WorkerState.DRAINING)], 2.0)
    assert book.absorb([record(epoch=2)], 3.0)


def test_a_record_of_a_dead_incarnation_is_not_believed() -> None:
    book = RecordBook(forget_after_s=3.0)
    book.absorb([record(epoch=2)], 0.0)
    assert not book.absorb([record(epoch=1)], 1.0)
    assert book.records[A].epoch == 2


def test_a_record_is_forgotten_only_after_a_while() -> None:
    book = RecordBook(forget_after_s=3.0)
    book.absorb([record("a"), record("b")], 0.0)
    assert not book.absorb([record("b")], 1.0)
    assert not book.absorb([record("b")], 3.9)
    assert set(book.records) == {A, B}
    assert book.absorb([record("b")], 4.0)
    assert set(book.records) == {B}
    book.absorb([], 5.0)
    assert not book.absorb([record("b")], 6.0), "it came back in time"
    assert not book.absorb([], 7.0)
    assert not book.absorb([], 9.9)
    assert book.absorb([], 10.0)
    assert book.absorb([record("a", epoch=1)], 11.0), "a forgotten worker may start again from epoch 1"


def test_hashes_are_those_of_the_workers_own_caches() -> None:
    tokens = list(range(20))
    hashes = PromptHashes(tokens)
    for size in (4, 16):
        assert hashes.of(HashKey("w", size)) == block_hashes(tokens, size, hash_namespace("w"))
        assert hashes.of(HashKey("w", size)) is hashes.of(HashKey("w", size))
    assert hashes.of(HashKey("", 4)) == () == hashes.of(HashKey("w", 0))
    salted = PromptHashes(tokens, salt="t")
    assert not set(salted.of(HashKey("w", 4))) & set(hashes.of(HashKey("w", 4)))


def tokens(*indices: int) -> tuple[TokenOutput, ...]:
    return tuple(TokenOutput(index, 1) for index in indices)


def completion() -> Completion:
    return Completion(
        finish=Finish(FinishReason.LENGTH),
        prompt_tokens=1,
        completion_tokens=2,
        cached_tokens=0,
        timing=Timeline(0.0).split(2, 1.0),
        landed=None,
        placement=Placement(
            prefill_worker=A,
            decode_worker=None,
            reason="",
            mode=Mode.COLOCATED,
            mode_reason=ModeReason.FIRST_TOKEN_IS_LAST,
            binding=None,
            predicted_ttft_s=0.1,
            predicted_tpot_s=0.0,
            staleness_s=0.0,
        ),
        num_asked=1,
    )


async def test_a_stream_gives_all_that_is_unread_in_one_piece() -> None:
    stream, bell = RequestStream(RequestId("r"), 3), Bell(ReadingTurns())
    assert stream.push(tokens(0))
    stream.wake(bell)
    await bell.wait()  # there was news before
    assert stream.push(tokens(1, 2))
    assert stream.take() == (list(tokens(0, 1, 2)), None)
    assert not stream.has_news
    await bell.wait()
    reader = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    assert stream.push(tokens(3))
    stream.finish(completion())
    await reader
    assert stream.take() == (list(tokens(3)), completion())


def test_an_error_comes_after_what_is_unread_unless_that_is_dropped() -> None:
    stream = RequestStream(RequestId("r"), 1)
    assert not stream.push(tokens(0, 1)), "more is unread than may be"
    stream.fail(Aborted("enough"))
    assert stream.take()[0] == list(tokens(0, 1))
    with pytest.raises(Aborted, match="enough"):
        stream.take()
    stream = RequestStream(RequestId("r"), 1)
    stream.push(tokens(0, 1))
    stream.fail(Aborted("slow"), drop_unread=True)
    with pytest.raises(Aborted, match="slow"):
        stream.take()


async def test_a_broadcast_wakes_all_who_took_it_before() -> None:
    news = Broadcast()
    first, second = news.next(), news.next()
    news.notify()
    assert first.is_set()
    assert second.is_set()
    assert not news.next().is_set()
