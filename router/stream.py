"""What one request's client will read: tokens in order, then the end. Bounded; the writer never waits."""

from dataclasses import dataclass

from core.errors import ServingError
from core.ids import RequestId, WorkerId
from core.request import Finish, PromptToken, TokenOutput
from router.messages import KvLanded
from router.reading_turns import Bell
from router.routing.modes import Binding, Mode, ModeReason
from router.timeline import TimingSplit


@dataclass(frozen=True, slots=True)
class Placement:
    """Who served a request, in which way, and what the decision behind it expected. `binding`: of a remote prefill."""

    prefill_worker: WorkerId | None
    decode_worker: WorkerId | None
    reason: str
    mode: Mode
    mode_reason: ModeReason
    binding: Binding | None
    predicted_ttft_s: float
    predicted_tpot_s: float
    staleness_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """How a request ended well, with all that is told about it."""

    finish: Finish
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timing: TimingSplit
    landed: KvLanded | None  # None: no KV crossed
    placement: Placement
    num_asked: int


class RequestStream:
    """From the dispatcher to whoever reads the request. The reader shares one bell among all streams that it reads,
    so that a batch of tokens for many of them wakes it once.

    Concurrency: one event loop, one writer, one reader.

    Attributes:
        prompt_tokens: the scored prompt, when that was asked for; there with the first token.
    """

    def __init__(self, request_id: RequestId, max_unread_tokens: int) -> None:
        self.request_id = request_id
        self.prompt_tokens: tuple[PromptToken, ...] = ()
        self._max_unread_tokens = max_unread_tokens
        self._tokens: list[TokenOutput] = []
        self._completion: Completion | None = None
        self._error: ServingError | None = None
        self._bell: Bell | None = None

    @property
    def has_news(self) -> bool:
        """`take` has something to return, or an error to raise."""
        return bool(self._tokens) or self._completion is not None or self._error is not None

    def wake(self, bell: Bell) -> None:
        """Ring this bell whenever there is news; at once if there is some already."""
        self._bell = bell
        if self.has_news:
            bell.ring()

    def push(self, tokens: tuple[TokenOutput, ...], prompt_tokens: tuple[PromptToken, ...] = ()) -> bool:
        """Add tokens. Returns False when more are unread now than may be; the caller then fails the stream."""
        if prompt_tokens:
            self.prompt_tokens = prompt_tokens
        self._tokens.extend(tokens)
        self._ring()
        return len(self._tokens) <= self._max_unread_tokens

    def finish(self, completion: Completion) -> None:
        self._completion = completion
        self._ring()

    def fail(self, error: ServingError, *, drop_unread: bool = False) -> None:
        """End with an error, which the reader meets after what is unread."""
        self._error = error
        if drop_unread:
            self._tokens.clear()
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    def take(self) -> tuple[list[TokenOutput], Completion | None]:
        """Return all unread tokens, and the completion once there is one (then call no more).

        Raises:
            ServingError: how the request failed, after everything before it was taken.
        """
        tokens, self._tokens = self._tokens, []
        if self._error is not None:
            if not tokens:
                raise self._error
            self._ring()
        return tokens, self._completion
