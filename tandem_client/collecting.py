"""Pieces to whole answers."""

from core.errors import ServingError
from tandem_client.types import (
    ChatPiece,
    Generation,
    Message,
    Piece,
    PromptToken,
    Reply,
    Summary,
    Token,
    ToolCall,
    ToolCallPiece,
)


class _Choice:
    """One of the n answers, as far as it came."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[Token] = []
        self.calls: list[tuple[str, str, list[str]]] = []
        self.summary: Summary | None = None

    def add_calls(self, pieces: tuple[ToolCallPiece, ...]) -> None:
        for piece in pieces:
            if piece.index == len(self.calls):
                self.calls.append((piece.id, piece.name, []))
            self.calls[piece.index][2].append(piece.arguments)

    def end(self) -> Summary:
        if self.summary is None:
            raise ServingError("the stream ended without saying how")
        return self.summary


class Generations:
    """The n texts of a call."""

    def __init__(self, n: int) -> None:
        self._choices = [_Choice() for _ in range(n)]
        self._scores: tuple[PromptToken, ...] = ()

    def add(self, piece: Piece) -> None:
        choice = self._choices[piece.choice]
        choice.texts.append(piece.text)
        choice.tokens.extend(piece.tokens)
        choice.summary = piece.summary
        self._scores = piece.started.prompt_scores

    def whole(self) -> list[Generation]:
        """Raises: ServingError, when one has no end."""
        return [Generation("".join(one.texts), tuple(one.tokens), one.end(), self._scores) for one in self._choices]


class Replies:
    """The n messages of a call."""

    def __init__(self, n: int) -> None:
        self._choices = [_Choice() for _ in range(n)]
        self._scores: tuple[PromptToken, ...] = ()

    def add(self, piece: ChatPiece) -> None:
        choice = self._choices[piece.choice]
        choice.texts.append(piece.content)
        choice.tokens.extend(piece.tokens)
        choice.add_calls(piece.tool_calls)
        choice.summary = piece.summary
        self._scores = piece.started.prompt_scores

    def whole(self) -> list[Reply]:
        """Raises: ServingError, when one has no end."""
        return [Reply(_message(one), tuple(one.tokens), one.end(), self._scores) for one in self._choices]


def _message(choice: _Choice) -> Message:
    calls = tuple(ToolCall(call_id, name, "".join(arguments)) for call_id, name, arguments in choice.calls)
    return Message("assistant", "".join(choice.texts), tool_calls=calls)
