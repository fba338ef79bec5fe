"""The answers to one chat call: messages, with the tool calls that were read out of their texts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from core.request import TokenOutput
from router.chat.assembler import ChatAssembler, ChatFinish
from router.chat.events import ChatDelta
from router.chat.plan import ChatPlan
from router.generation.answer import Answer
from router.stream import Completion


class ChatPiece(NamedTuple):
    """News of one choice. What of its message became certain may lag behind the tokens; with `completion`, this choice
    is over, and `finish_reason` says why."""

    choice: int
    deltas: Sequence[ChatDelta]
    tokens: Sequence[TokenOutput]
    completion: Completion | None
    finish_reason: ChatFinish | None


class ChatAnswer:
    """Reads an `Answer` of one prompt as messages.

    Args:
        new_id: makes the random part of a tool call's id.

    Concurrency: as the answer.
    """

    def __init__(self, answer: Answer, plan: ChatPlan, new_id: Callable[[], str]) -> None:
        self.answer = answer
        self._plan = plan
        self._new_id = new_id
        self._assemblers: dict[int, ChatAssembler] = {}

    @property
    def is_over(self) -> bool:
        """As `Answer.is_over`."""
        return self.answer.is_over

    def abandon(self, reason: str) -> None:
        """As `Answer.abandon`."""
        self.answer.abandon(reason)

    async def take(self) -> list[ChatPiece]:
        """As `Answer.take`."""
        return [
            self._piece(piece.choice, piece.text, piece.tokens, piece.completion) for piece in await self.answer.take()
        ]

    def _piece(self, choice: int, text: str, tokens: Sequence[TokenOutput], completion: Completion | None) -> ChatPiece:
        assembler = self._assemblers.get(choice)
        if assembler is None:
            assembler = self._assemblers[choice] = ChatAssembler(self._plan, self._new_id)
        deltas = assembler.push(text, is_last=completion is not None)
        reason = assembler.finish_reason(completion.finish) if completion is not None else None
        return ChatPiece(choice, deltas, tokens, completion, reason)
