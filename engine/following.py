"""Requests that follow a grammar: their walks begin, are told every token, end the request, or fail it.

A walk's answer comes from another process; nothing here waits for it longer than `mask_wait_s`, and nobody else waits
at all: a request whose answer is late leaves out steps until it comes, or until its time is up.
"""

from collections.abc import Mapping, Sequence

from core.clock import Clock
from core.errors import ServingError
from core.ids import RequestId
from core.request import Finish, FinishReason
from engine.sequence import SequenceState, TokenSequence
from grammar.walk import Grammar, await_answers

_OVER = Finish(FinishReason.STOP)
_GOING_ON = frozenset({SequenceState.WAITING, SequenceState.RUNNING})


class Following:
    """All walks of one engine."""

    def __init__(self, clock: Clock, *, mask_wait_s: float, mask_timeout_s: float) -> None:
        self._clock = clock
        self._mask_wait_s = mask_wait_s
        self._mask_timeout_s = mask_timeout_s
        self._sequences: dict[RequestId, TokenSequence] = {}

    def begin(self, sequence: TokenSequence, grammar: Grammar, token_ids: Sequence[int]) -> None:
        """Follow `grammar` from after `token_ids`, which were generated already."""
        sequence.walk = grammar.open_walk(sequence.sampling.end_token_ids, token_ids)
        self._sequences[sequence.request_id] = sequence

    def advance(self, sequence: TokenSequence, token_id: int, finish: Finish | None) -> Finish | None:
        """Tell the walk of a generated token; return how the request ends by it, if it does.

        A text that is complete with the last token that its length allows is complete, and one that is complete with
        its first token is handed over to nobody: these answers are awaited.
        """
        walk = sequence.walk
        if walk is None or (finish is not None and finish.reason is FinishReason.STOP):
            return finish
        walk.advance(token_id)
        if finish is not None or sequence.is_prefill:
            await_answers([walk], self._mask_wait_s, self._clock)
            if walk.is_ready and walk.is_over:
                return _OVER
        return finish

    def settle(self, *, can_wait: bool) -> list[tuple[TokenSequence, Finish | ServingError]]:
        """Take the answers that are here; return the requests that end by them.

        Args:
            can_wait: nothing else can be done before an answer comes.
        """
        if not self._sequences:
            return []
        going_on = [
            (sequence, walk)
            for sequence in self._sequences.values()
            if (walk := sequence.walk) is not None and sequence.state in _GOING_ON
        ]
        await_answers([walk for _, walk in going_on], self._mask_wait_s if can_wait else 0.0, self._clock)
        now = self._clock.now()
        ended: list[tuple[TokenSequence, Finish | ServingError]] = []
        for sequence, walk in going_on:
            walk.check_time(now, self._mask_timeout_s)
            if walk.error is not None:
                ended.append((sequence, walk.error))
            elif walk.is_ready and walk.is_over:
                ended.append((sequence, _OVER))
        return ended

    def end(self, sequence: TokenSequence) -> None:
        """Forget a request."""
        if self._sequences.pop(sequence.request_id, None) is not None and sequence.walk is not None:
            sequence.walk.close()

    def check(self, live: Mapping[RequestId, TokenSequence]) -> None:
        """Assert that all that have a walk are followed, and nobody else."""
        assert all(live.get(request_id) is sequence for request_id, sequence in self._sequences.items())
        assert all((each.walk is not None) is (request_id in self._sequences) for request_id, each in live.items())
        assert all(each.has_grammar for each in self._sequences.values())
