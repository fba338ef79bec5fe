"""The life of one compiling process: compile one constraint, try it, say so; then follow it for an engine.

What goes wrong here is this constraint's own affair: the process has a bound on its memory, and whoever started it
kills it when it takes too long.
"""

import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xgrammar
from numpy.typing import NDArray

from core.constraint import Constraint
from grammar import wire
from grammar.compiling import Tokens, compile_constraint, reason_of, warning_in

_TRIALS = 2  # random texts that a constraint is tried with
_TRIAL_TOKENS = 24
_STDERR = 2
_HEARD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Task:
    """What the process is for.

    Attributes:
        token_timeout_s: a trial in which one token takes longer is a refusal.
        is_followed: an engine will use it; otherwise the verdict is all.
    """

    constraint: Constraint
    token_timeout_s: float
    is_followed: bool


class Session:
    """Follows one grammar."""

    def __init__(self, tokens: Tokens, grammar: xgrammar.CompiledGrammar) -> None:
        self._silent = tokens.silent  # only these may end a text
        self._nobody = tokens.info.vocab_size - 1  # an id that no model has: ends the texts that nothing else ends
        self._grammar = grammar
        self._words: NDArray[np.int32] = np.zeros((1, (tokens.info.vocab_size + 31) // 32), np.int32)
        self._ends: dict[tuple[int, ...], NDArray[np.int32]] = {}
        self._walks: dict[int, tuple[xgrammar.GrammarMatcher, NDArray[np.int32]]] = {}

    def open(self, walk: int, end_token_ids: tuple[int, ...]) -> None:
        ends = tuple(one for one in end_token_ids if one in self._silent) or (self._nobody,)
        matcher = xgrammar.GrammarMatcher(self._grammar, override_stop_tokens=list(ends))
        if ends not in self._ends:
            bits = np.zeros(32 * self._words.shape[1], np.bool_)
            bits[list(ends)] = True
            bits[self._nobody :] = True
            self._ends[ends] = np.packbits(bits, bitorder="little").view(np.int32)
        self._walks[walk] = matcher, self._ends[ends]

    def advance(self, walk: int, token_ids: tuple[int, ...]) -> tuple[wire.Status, bytes]:
        """Take tokens; say what may follow."""
        matcher, ends = self._walks[walk]
        for token_id in token_ids:
            if not matcher.accept_token(token_id):
                return wire.Status.REFUSED, b""
        if matcher.is_terminated():
            return wire.Status.OVER, b""
        if not matcher.fill_next_token_bitmask(self._words):
            return wire.Status.ANY, b""
        words = self._words[0]
        if not (words & ~ends).any():
            return (wire.Status.OVER if matcher.is_completed() else wire.Status.STUCK), b""
        return wire.Status.MASK, words.tobytes()

    def close(self, walk: int) -> None:
        self._walks.pop(walk, None)

    def rehearse(self, timeout_s: float) -> str:
        """Follow random texts; return what is wrong with the grammar, or nothing."""
        for seed in range(_TRIALS):
            rng = random.Random(seed)
            self.open(0, ())
            token_ids: tuple[int, ...] = ()
            for at in range(_TRIAL_TOKENS):
                began = time.process_time()  # a busy machine is not the grammar's fault
                status, mask = self.advance(0, token_ids)
                if time.process_time() - began > timeout_s:
                    return f"following it takes more than {timeout_s:g} s for one token"
                if status is wire.Status.STUCK:
                    return "no text can match it" if at == 0 else "a text can begin that no token can complete"
                if status is wire.Status.OVER:
                    if at == 0:
                        return "only the empty text matches it"
                    break
                bits = np.unpackbits(np.frombuffer(mask or self._words.tobytes(), np.uint8), bitorder="little")
                allowed = np.flatnonzero(bits[: self._nobody])
                if not len(allowed):
                    break
                token_ids = (int(rng.choice(allowed)),)
            self.close(0)
        return ""


def run(connection: socket.socket, task: Task, tokens: Tokens) -> None:
    """Say the verdict over `connection`; then serve until the other end closes."""
    try:
        compiler = xgrammar.GrammarCompiler(tokens.info, max_threads=1, cache_enabled=False)
        with _standard_error() as heard:
            grammar = compile_constraint(compiler, task.constraint, tokens)
            problem = warning_in(heard())
        session = Session(tokens, grammar)
        problem = problem or session.rehearse(task.token_timeout_s)
    except MemoryError:
        problem = "needs too much memory"
    except Exception as error:  # whatever a foreign compiler raises is a refusal of this constraint
        problem = "needs too much memory" if "bad_alloc" in str(error) else reason_of(error)
    connection.sendall(json.dumps({"problem": problem}).encode())
    if problem or not task.is_followed:
        return
    while packet := connection.recv(wire.MAX_PACKET_BYTES):
        command = wire.read_command(packet)
        match command.kind:
            case wire.OPEN:
                session.open(command.walk, command.end_token_ids)
            case wire.CLOSE:
                session.close(command.walk)
                continue
        connection.sendall(wire.answer_packet(command.walk, *session.advance(command.walk, command.token_ids)))


@contextmanager
def _standard_error() -> Iterator[Callable[[], str]]:
    """Return what foreign code writes to standard error meanwhile. It quotes strangers, so no log has it."""
    with os.fdopen(os.memfd_create("stderr"), "r+b") as heard:
        before = os.dup(_STDERR)
        os.dup2(heard.fileno(), _STDERR)
        try:
            yield lambda: os.pread(heard.fileno(), _HEARD_BYTES, 0).decode(errors="replace")
        finally:
            os.dup2(before, _STDERR)
            os.close(before)
