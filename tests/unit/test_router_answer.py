"""The answer to a call with several choices: one reader of all of them, whoever ends first."""

import asyncio
from collections.abc import Sequence

import pytest

from core.errors import Aborted, ProtocolError, ServingError, WorkerLost
from core.ids import RequestId
from core.request import Finish, FinishReason, GenerateRequest, PromptToken, SamplingParams, TokenOutput
from router.generation.answer import Answer, ChoicePiece
from router.generation.provenance import Provenance
from router.generation.text import GenerationText
from router.reading_turns import ReadingTurns
from router.routing.modes import Mode, ModeReason
from router.stream import Completion, Placement, RequestStream
from router.timeline import Timeline

PATIENCE_S = 5.0
REQUEST = GenerateRequest(RequestId("r"), (1, 2), SamplingParams())


class Letters:
    """A detokenizer whose ids are code points."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def flush(self) -> str:
        return ""


def completion() -> Completion:
    placement = Placement(None, None, "", Mode.COLOCATED, ModeReason.FIRST_TOKEN_IS_LAST, None, 0.1, 0.0, 0.0)
    split = Timeline(0.0).split(1, 1.0)
    return Completion(Finish(FinishReason.LENGTH), 2, 1, 0, split, landed=None, placement=placement, num_asked=1)


def token(letter: str, index: int = 0) -> tuple[TokenOutput, ...]:
    return (TokenOutput(index, ord(letter)),)


class Call:
    """An answer, its streams, and what became of them."""

    def __init__(self, num_choices: int, *scored: int) -> None:
        self.ended: list[tuple[RequestId, ServingError]] = []
        self.num_over = 0
        self.answer = Answer((REQUEST,), "m", Provenance(), turns=ReadingTurns(), end=self._end, on_over=self._over)
        self.streams = [RequestStream(RequestId(f"r.{number}"), 100) for number in range(num_choices)]
        for number, stream in enumerate(self.streams):
            text = GenerationText(lambda _: Letters(), REQUEST)
            self.answer.add(stream, text, scores_prompt=number in scored)

    async def take(self) -> list[ChoicePiece]:
        async with asyncio.timeout(PATIENCE_S):
            return await self.answer.take()

    def _end(self, stream: RequestStream, error: ServingError) -> None:
        self.ended.append((stream.request_id, error))
        stream.fail(error)

    def _over(self) -> None:
        self.num_over += 1


async def test_what_comes_in_one_turn_wakes_the_reader_once() -> None:
    call = Call(3)
    reader = asyncio.create_task(call.take())
    await asyncio.sleep(0)
    for number, stream in enumerate(call.streams[:2]):
        stream.push(token("ab"[number]))
        stream.push(token("xy"[number], 1))
    pieces = await reader
    assert [(piece.choice, piece.text, len(piece.tokens)) for piece in pieces] == [(0, "ax", 2), (1, "by", 2)]
    assert not call.answer.is_over


async def test_it_is_over_once_the_last_choice_is() -> None:
    call = Call(2)
    call.streams[1].push(token("b"))
    call.streams[1].finish(completion())
    (piece,) = await call.take()
    assert (piece.choice, piece.text, piece.completion) == (1, "b", completion())
    assert not call.answer.is_over
    call.streams[0].finish(completion())
    (piece,) = await call.take()
    assert (piece.choice, piece.text) == (0, "")
    assert call.num_over == 1
    call.answer.abandon("late")
    assert (call.num_over, call.ended) == (1, [])


async def test_a_failed_choice_ends_the_others_after_all_before_it_was_taken() -> None:
    call = Call(3)
    call.streams[0].push(token("a"))
    call.streams[1].push(token("b"))
    call.streams[1].fail(WorkerLost("gone"))
    pieces = await call.take()
    assert [piece.text for piece in pieces] == ["a", "b"]
    with pytest.raises(WorkerLost, match="gone"):
        await call.take()
    assert call.answer.is_over
    assert {name for name, _ in call.ended} == {"r.0", "r.1", "r.2"}
    assert all("another choice" in str(error) for _, error in call.ended)
    assert call.num_over == 1


async def test_a_failure_is_not_put_off_by_choices_that_go_on() -> None:
    call = Call(2)
    call.streams[0].fail(WorkerLost("gone"))
    call.streams[1].push(token("x"))
    assert [piece.choice for piece in await call.take()] == [1]
    call.streams[1].push(token("y", 1))
    with pytest.raises(WorkerLost):
        await call.take()


async def test_an_abort_is_what_the_reader_meets() -> None:
    call = Call(2)
    reader = asyncio.create_task(call.take())
    await asyncio.sleep(0)
    call.answer.abort(Aborted("by name"))
    with pytest.raises(Aborted, match="by name"):
        await reader
    assert call.num_over == 1


async def test_an_abandoned_answer_ends_every_choice_once() -> None:
    call = Call(2)
    call.answer.abandon("gone")
    call.answer.abandon("gone")
    assert [name for name, _ in call.ended] == ["r.0", "r.1"]
    assert call.answer.is_over
    assert call.num_over == 1


async def test_scores_of_the_prompt_are_there_before_any_piece() -> None:
    scores = (PromptToken(1, None), PromptToken(2, -0.5))
    call = Call(2, 0)
    call.streams[1].push(token("b"))
    reader = asyncio.create_task(call.take())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not reader.done()
    call.streams[0].push(token("a"), scores)
    assert [piece.text for piece in await reader] == ["a", "b"]
    assert call.answer.prompt_tokens == (scores,)
    call.streams[1].push(token("c", 1))
    assert [piece.text for piece in await call.take()] == ["c"], "nobody waits for the first choice any more"


async def test_scores_that_a_worker_left_out_are_an_error() -> None:
    call = Call(1, 0)
    call.streams[0].push(token("a"))
    with pytest.raises(ProtocolError, match="no scores"):
        await call.take()
    assert [name for name, _ in call.ended] == ["r.0"]
