"""A worker's side of the streams of all its gateways: reports gathered over one turn of the event loop.

A turn is one callback: an engine step that ended, a command that came. Everything that it has to say to one gateway
leaves at its end in one go: first what must precede tokens, then one batch with the tokens of all that gateway's
requests, then the rest. So a step wakes the writer of a stream once, however many requests it served. Only scored
prompts, which may be large, leave in messages of their own.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Generic, TypeVar

from core.errors import ServingError
from core.request import RequestOutput
from core.streams import Outbox

R = TypeVar("R")


class _Turn(Generic[R]):
    """What one turn has to say to one gateway."""

    def __init__(self) -> None:
        self.before: list[R] = []
        self.outputs: list[RequestOutput] = []
        self.after: list[R] = []


class GatewayStreams(Generic[R]):
    """The open streams of one worker; R is its type of report.

    Args:
        batch: makes one report of the tokens of a turn.
    """

    def __init__(self, max_unread: int, batch: Callable[[tuple[RequestOutput, ...]], R]) -> None:
        self._max_unread = max_unread
        self._batch = batch
        self._turns: dict[Outbox[R], _Turn[R]] = {}

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[Outbox[R]]:
        return iter(list(self._turns))

    def connect(self) -> Outbox[R]:
        stream = Outbox[R](self._max_unread)
        self._turns[stream] = _Turn()
        return stream

    def disconnect(self, stream: Outbox[R]) -> None:
        """Forget a stream that has ended; what is said to it from now on is dropped."""
        stream.close()
        self._turns.pop(stream, None)

    def precede(self, stream: Outbox[R], report: R) -> None:
        """Say before the tokens of this turn."""
        if turn := self._turns.get(stream):
            turn.before.append(report)

    def output(self, stream: Outbox[R], output: RequestOutput) -> None:
        """Add tokens to this turn's batch."""
        if turn := self._turns.get(stream):
            turn.outputs.append(output)

    def follow(self, stream: Outbox[R], report: R) -> None:
        """Say after the tokens of this turn."""
        if turn := self._turns.get(stream):
            turn.after.append(report)

    def flush(self) -> None:
        """End the turn."""
        for stream, turn in self._turns.items():
            for report in turn.before:
                stream.put(report)
            if turn.outputs:
                for outputs in _batches(turn.outputs):
                    stream.put(self._batch(outputs))
            for report in turn.after:
                stream.put(report)
            turn.before, turn.outputs, turn.after = [], [], []

    def broadcast(self, report: R) -> None:
        """Say to every gateway, now."""
        for stream in self._turns:
            stream.put(report)

    def close(self, error: ServingError | None = None) -> None:
        """End every stream once what was said has left."""
        for stream in self._turns:
            stream.close(error)


def _batches(outputs: list[RequestOutput]) -> Iterator[tuple[RequestOutput, ...]]:
    """Several scored prompts in one message could be larger than a message may be. Their order is kept."""
    if not any(output.prompt_tokens for output in outputs):
        yield tuple(outputs)
        return
    for is_scored, group in groupby(outputs, lambda output: bool(output.prompt_tokens)):
        if is_scored:
            yield from ((output,) for output in group)
        else:
            yield tuple(group)
