"""A grammar whose process is this test: it answers when it is told to, and dies or contradicts when it is told to.

What it allows of `tests.fake_model`'s tokens depends on all tokens so far, so a walk that missed one shows. The socket
is real, and so is all of `grammar.walk`.
"""

import socket

import numpy as np

from core.clock import MonotonicClock
from core.constraint import Constraint, ConstraintKind
from engine.counter_random import mix64
from grammar import wire
from grammar.walk import Grammar
from tests.fake_model import EOS, VOCAB_SIZE


def allowed(tokens: tuple[int, ...]) -> frozenset[int]:
    """Return what may follow these: about a third of all, the end sometimes; nothing when they are complete."""
    digest = 7
    for token in tokens:
        digest = mix64(digest ^ (token + 1))
    if len(tokens) > 2 and digest % 11 == 0:
        return frozenset()
    found = {token for token in range(VOCAB_SIZE - 1) if mix64(digest ^ (token << 20)) % 3 == 0}
    return frozenset(found | {EOS} if digest % 5 == 0 and tokens else found or {1})


class ScriptedGrammar:
    """One constraint and the process that follows it."""

    def __init__(self, name: str = "") -> None:
        ours, self._connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.setblocking(False)
        self.constraint = Constraint(ConstraintKind.REGEX, f"scripted {name}")
        self.is_killed = False
        self.grammar = Grammar(self.constraint, ours, MonotonicClock(), self._kill)
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._ends: dict[int, tuple[int, ...]] = {}
        self._unanswered: list[wire.Command] = []

    def answer(self, count: int | None = None) -> int:
        """Answer what is unanswered, the oldest first; return how many there were."""
        self._read()
        asked, self._unanswered = self._unanswered[:count], self._unanswered[count:] if count is not None else []
        for command in asked:
            if command.kind == wire.OPEN:
                self._tokens[command.walk] = ()
                self._ends[command.walk] = command.end_token_ids
            tokens = self._tokens[command.walk]
            is_refused = False
            for token in command.token_ids:
                is_refused = is_refused or token not in allowed(tokens)
                tokens = (*tokens, token)
            self._tokens[command.walk] = tokens
            following = allowed(tokens) - ({EOS} if EOS not in self._ends[command.walk] else set())
            status = wire.Status.MASK if following else wire.Status.OVER
            bits = np.zeros(VOCAB_SIZE, np.bool_)
            bits[list(following)] = True
            mask = np.packbits(bits, bitorder="little").tobytes() if following else b""
            self._send(command.walk, wire.Status.REFUSED if is_refused else status, mask)
        return len(asked)

    def say(self, status: wire.Status) -> None:
        """Answer the oldest that is unanswered with a status of the test's choice."""
        self._read()
        self._send(self._unanswered.pop(0).walk, status, b"")

    def die(self) -> None:
        self._connection.close()

    @property
    def num_open(self) -> int:
        """Walks that were opened and not closed."""
        self._read()
        opened = {command.walk for command in self._unanswered if command.kind == wire.OPEN}
        return len(self._tokens.keys() | opened)

    def _read(self) -> None:
        while True:
            try:
                packet = self._connection.recv(wire.MAX_PACKET_BYTES)
            except (BlockingIOError, OSError):
                return
            if not packet:
                return
            command = wire.read_command(packet)
            if command.kind == wire.CLOSE:
                self._tokens.pop(command.walk, None)
                self._unanswered = [one for one in self._unanswered if one.walk != command.walk]
            else:
                self._unanswered.append(command)

    def _send(self, walk: int, status: wire.Status, mask: bytes) -> None:
        self._connection.send(wire.answer_packet(walk, status, mask))

    def _kill(self) -> None:
        self.is_killed = True
        self._connection.close()
