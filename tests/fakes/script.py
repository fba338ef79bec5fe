"""What the fake workers of a test share, and how each behaves: change it at any time."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from core.errors import RejectedError, RejectReason
from core.membership import LoadReport
from core.request import Finish, FinishReason, TokenOutput
from protos import worker_pb2 as pb

PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What the "model" generates for one request."""

    token_ids: tuple[int, ...]
    finish: Finish = Finish(FinishReason.LENGTH)  # noqa: RUF009 - frozen


def echo_alphabet(request: pb.WorkRequest) -> Reply:
    """Generate a b c ... (ids of a byte tokenizer, see checkpoint.py), shifted by the seed unless greedy."""
    shift = 0 if request.sampling.temperature == 0 else request.sampling.seed % 26
    first = ord("a") - 33  # the byte alphabet begins at "!"
    return Reply(tuple(first + (shift + index) % 26 for index in range(request.sampling.max_tokens)))


class FakeNetwork:
    """What the workers of one test share."""

    def __init__(self, reply: Callable[[pb.WorkRequest], Reply] = echo_alphabet) -> None:
        self.reply = reply
        self.bytes_per_token = 1024
        self.padding_logprobs = 0  # alternatives per token beyond those asked for: big messages
        self._landed: dict[str, asyncio.Event] = {}

    def landing(self, transfer_id: str) -> asyncio.Event:
        """Return the event that a prefill worker sets and a decode worker waits for."""
        return self._landed.setdefault(transfer_id, asyncio.Event())


@dataclass
class WorkerScript:
    """How a worker behaves."""

    refusals: deque[RejectedError] = field(default_factory=deque)
    always_refuse: RejectedError | None = None
    is_silent: bool = False  # neither accepts nor rejects
    go: asyncio.Event = field(default_factory=asyncio.Event)  # prefill: may compute; decode: may take its steps
    pretended_load: LoadReport = LoadReport()  # noqa: RUF009 - frozen; on top of what it holds
    failure: pb.WorkFailed | None = None  # sent instead of tokens
    garble: Callable[[tuple[TokenOutput, ...]], tuple[TokenOutput, ...]] | None = None

    def __post_init__(self) -> None:
        self.go.set()

    def next_refusal(self) -> RejectedError | None:
        return self.refusals.popleft() if self.refusals else self.always_refuse


def client_id(work_id: str) -> str:
    """Return the client's id of the request that a work was made for."""
    return work_id.rpartition("/")[0]


def refusal(reason: RejectReason = RejectReason.QUEUE_FULL, retry_after_s: float = 0.0) -> RejectedError:
    return RejectedError(reason, "scripted", retry_after_s)
