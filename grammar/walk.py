"""One generation's way through a grammar, as an engine sees it: which tokens may come next, or that it is over.

The work is done in another process (`grammar.session`), while the engine computes: `advance` says which token was
chosen and returns at once, `Grammar.receive` takes the answers that have come. What may follow depends on the
constraint and the tokens only, so a walk that begins again elsewhere with the same tokens goes on alike.

Concurrency: a `Grammar` and its walks belong to one thread, the engine's.
"""

import select
import socket
from collections.abc import Callable, Iterable
from itertools import count
from weakref import WeakValueDictionary, finalize

import numpy as np
from numpy.typing import NDArray

from core.clock import Clock
from core.constraint import Constraint
from core.errors import InvalidRequest, ServingError, WorkerLost
from grammar import wire
from grammar.bounds import field_of


class Walk:
    """What became of one generation's text so far.

    Attributes:
        is_ready: the answer to the last token is here.
        is_over: the text is complete and nothing can follow.
        mask: uint8, a bit per token that may follow, the lowest first; None: every token may. Meaningless unless ready.
        error: why this generation cannot go on.
        must_wait: its answer did not come in time for a step, or it has had none yet: no step is made for it before.
    """

    def __init__(self, grammar: "Grammar", number: int) -> None:
        self.grammar = grammar
        self.is_ready = False
        self.is_over = False
        self.mask: NDArray[np.uint8] | None = None
        self.error: ServingError | None = None
        self.must_wait = True
        self._number = number
        self._asked_at = 0.0
        self._num_unanswered = 0

    @property
    def is_held(self) -> bool:
        """Whether the next token cannot be computed in the step that is planned now."""
        return self.must_wait and not self.is_ready

    @property
    def can_choose(self) -> bool:
        """Whether the next token can be chosen now."""
        return self.is_ready and not self.is_over and self.error is None

    def advance(self, token_id: int) -> None:
        """Tell of a token that was chosen; the next answer is awaited."""
        self._ask(wire.Command(wire.ADVANCE, self._number, (), (token_id,)))

    def close(self) -> None:
        """Forget it. Idempotent."""
        self.grammar.close_walk(self._number)

    def check_time(self, now: float, timeout_s: float) -> None:
        """Give up, and the grammar with it, when the answer takes longer than `timeout_s`."""
        if not self.is_ready and self.error is None and now - self._asked_at > timeout_s:
            problem = f"takes more than {timeout_s:g} s to say which tokens may come next"
            self.grammar.fail(InvalidRequest(field_of(self.grammar.constraint), problem))

    def take(self, status: wire.Status, mask: bytes) -> None:
        """Take an answer of the process."""
        self._num_unanswered -= 1
        if status is wire.Status.STUCK:
            self.fail(
                InvalidRequest(field_of(self.grammar.constraint), "no token can follow the text generated so far")
            )
        elif status is wire.Status.REFUSED:
            self.fail(ServingError("a token that was generated elsewhere does not fit the request's constraint"))
        elif self._num_unanswered == 0 and self.error is None:
            self.is_ready = True
            self.must_wait = False
            self.is_over = status is wire.Status.OVER
            self.mask = np.frombuffer(mask, np.uint8) if status is wire.Status.MASK else None

    def fail(self, error: ServingError) -> None:
        if self.error is None:
            self.error = error
        self.is_ready = True

    def begin(self, end_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> None:
        self._ask(wire.Command(wire.OPEN, self._number, end_token_ids, token_ids))

    def _ask(self, command: wire.Command) -> None:
        self.is_ready = False
        self._asked_at = self.grammar.clock.now()
        packets = wire.command_packets(command)
        self._num_unanswered += len(packets)
        for packet in packets:
            self.grammar.send(packet)


class Grammar:
    """A constraint that is ready to be followed, and the process that does it.

    The process ends when nobody refers to this object any more.
    """

    def __init__(
        self, constraint: Constraint, connection: socket.socket, clock: Clock, kill: Callable[[], None]
    ) -> None:
        """
        Args:
            kill: ends the process; any thread.
        """
        self.constraint = constraint
        self.clock = clock
        self.error: ServingError | None = None
        self._connection = connection
        self._kill = kill
        self._numbers = count(1)
        self._walks: WeakValueDictionary[int, Walk] = WeakValueDictionary()
        connection.setblocking(False)
        finalize(self, connection.close)

    def open_walk(self, end_token_ids: Iterable[int], token_ids: Iterable[int]) -> Walk:
        """Begin a walk after `token_ids`, which were generated already."""
        walk = Walk(self, next(self._numbers))
        self._walks[walk._number] = walk
        if self.error is not None:
            walk.fail(self.error)
        else:
            walk.begin(tuple(end_token_ids), tuple(token_ids))
        return walk

    def close_walk(self, number: int) -> None:
        if self._walks.pop(number, None) is not None and self.error is None:
            self.send(wire.command_packets(wire.Command(wire.CLOSE, number))[0])

    def send(self, packet: bytes) -> None:
        if self.error is not None:
            return
        try:
            self._connection.send(packet)
        except BlockingIOError:
            self.receive()  # the process may be waiting for us to read its answers
            self._send_again(packet)
        except OSError as error:
            self._lost(error)

    def receive(self) -> None:
        """Take every answer that is here; never waits."""
        while self.error is None:
            try:
                packet = self._connection.recv(wire.MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._lost(error)
                return
            if not packet:
                self._lost(None)
                return
            number, status, mask = wire.read_answer(packet)
            walk = self._walks.get(number)
            if walk is not None:
                walk.take(status, mask)

    def fail(self, error: ServingError) -> None:
        """End the process, and all its walks with `error`."""
        if self.error is None:
            self.error = error
            self._kill()
            for walk in list(self._walks.values()):
                walk.fail(error)

    def fileno(self) -> int:
        return self._connection.fileno()

    def _send_again(self, packet: bytes) -> None:
        try:
            self._connection.send(packet)
        except OSError:
            field = field_of(self.constraint)
            self.fail(InvalidRequest(field, "too many generations wait to hear which tokens may come next"))

    def _lost(self, error: OSError | None) -> None:
        self.fail(WorkerLost(f"the process that followed a constraint has ended: {error or 'it closed its end'}"))


def await_answers(walks: Iterable[Walk], timeout_s: float, clock: Clock) -> None:
    """Take the answers to these walks, and wait for those that are not here, `timeout_s` at most."""
    deadline = clock.now() + timeout_s
    waiting = [walk for walk in walks if not walk.is_ready]
    for grammar in {id(walk.grammar): walk.grammar for walk in waiting}.values():
        grammar.receive()
    while waiting := [walk for walk in waiting if not walk.is_ready]:
        left = deadline - clock.now()
        readable, _, _ = select.select({walk.grammar for walk in waiting}, [], [], left) if left > 0 else ((), (), ())
        if not readable:
            return
        for grammar in readable:
            grammar.receive()
