"""All choices of a call as one thing that is read: pieces of text and tokens, whichever choice they belong to.

Life of an answer: its choices are in the dispatcher -> `take` until `is_over` -> forgotten. One choice that fails fails
the answer, and the others are aborted; a reader that leaves early abandons it, and all are aborted.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from core.errors import Aborted, ProtocolError, ServingError
from core.request import GenerateRequest, PromptToken, TokenOutput
from router.generation.provenance import Provenance
from router.generation.text import GenerationText
from router.reading_turns import Bell, ReadingTurns
from router.stream import Completion, RequestStream


class ChoicePiece(NamedTuple):
    """News of one choice. `text` became certain and may lag behind the tokens; `completion`: this choice is over."""

    choice: int
    text: str
    tokens: Sequence[TokenOutput]
    completion: Completion | None


class _Choice(NamedTuple):
    stream: RequestStream
    text: GenerationText
    scores_prompt: bool


class Answer:
    """What one call gives.

    Args:
        requests: one per prompt; the seed of the first is the base of all.
        turns: shared by all answers of the gateway.
        end: ends the request of a stream, if it still runs.
        on_over: told once, when no choice is in flight any more.

    Concurrency: the event loop's thread, one reader.
    """

    def __init__(
        self,
        requests: tuple[GenerateRequest, ...],
        model: str,
        provenance: Provenance,
        *,
        turns: ReadingTurns,
        end: Callable[[RequestStream, ServingError], None],
        on_over: Callable[[], None],
    ) -> None:
        self.requests = requests
        self.model = model
        self.provenance = provenance
        self._end = end
        self._on_over = on_over
        self._bell = Bell(turns)
        self._open: dict[int, _Choice] = {}
        self._scored: list[RequestStream] = []
        self._are_scores_here = False
        self._error: ServingError | None = None

    @property
    def is_over(self) -> bool:
        """Every choice ended well and was taken, or all were ended."""
        return not self._open

    @property
    def prompt_tokens(self) -> tuple[tuple[PromptToken, ...], ...]:
        """The scored prompts, when scores were asked for; there as soon as `take` returned once."""
        return tuple(stream.prompt_tokens for stream in self._scored)

    def add(self, stream: RequestStream, text: GenerationText, *, scores_prompt: bool) -> None:
        """The next choice was submitted."""
        if scores_prompt:
            self._scored.append(stream)
        self._open[len(self._open)] = _Choice(stream, text, scores_prompt)
        stream.wake(self._bell)

    async def take(self) -> list[ChoicePiece]:
        """Wait for news of any choice; return all there is. Not to be called once the answer is over.

        Raises:
            ServingError: how the first choice that failed did; everything before it was taken, and no choice runs on.
        """
        while self._error is None:
            await self._bell.wait()
            pieces = self._pieces()
            if pieces:
                return pieces
        self._give_up(Aborted(f"another choice of the same call failed: {self._error}"))
        raise self._error

    def abort(self, error: ServingError) -> None:
        """End every choice; the reader meets `error`."""
        for choice in list(self._open.values()):
            self._end(choice.stream, error)

    def abandon(self, reason: str) -> None:
        """End every choice that still runs: nobody reads it any more. Idempotent."""
        self._give_up(Aborted(reason))

    def _pieces(self) -> list[ChoicePiece]:
        if not self._are_scores_here:
            # Prompts are told of before their answers, so the choices of the others wait for the slowest prompt.
            if not all(stream.has_news for stream in self._scored):
                return []
            self._are_scores_here = True
        pieces = []
        for number, choice in list(self._open.items()):
            if not choice.stream.has_news:
                continue
            try:
                tokens, completion = choice.stream.take()
            except ServingError as error:
                self._error = self._error or error
                continue
            if choice.scores_prompt and not choice.stream.prompt_tokens:
                self._error = ProtocolError("a worker sent no scores of the prompt")
                return []
            text = choice.text.push(tokens, completion.finish if completion is not None else None)
            pieces.append(ChoicePiece(number, text, tokens, completion))
            if completion is not None:
                del self._open[number]
        if pieces and not self._open:
            self._on_over()
        return pieces

    def _give_up(self, error: ServingError) -> None:
        if self._open:
            self.abort(error)
            self._open.clear()
            self._on_over()
