"""One generation inside the engine: its tokens, how far they are computed, the blocks it holds, its life.

Life: a request is added and waits, runs, and ends; one with a constraint gets its grammar before it waits. With a
hand-off it either ends as a lease on the prefill side (unless it is kept there), or begins as a reservation on the
decode side. Preemption takes its blocks and lets it wait again; its tokens stay, and so does its walk through the
grammar. Mutable, and changed by the engine thread only.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from core.blocks import extend_hash, num_blocks
from core.errors import InvalidTransition
from core.request import Finish, GenerateRequest, PromptToken
from engine.prefix_cache import CacheEntry
from engine.prompt_scores import PromptScores
from engine.sampler import SamplingState
from engine.stops import StopChecker
from grammar.walk import Grammar, Walk


class SequenceState(StrEnum):
    UNREADY = "unready"  # its grammar is being compiled; holds nothing
    WAITING = "waiting"  # holds nothing
    RUNNING = "running"  # in the batch
    LEASED = "leased"  # prefilled; out of the batch until the hand-off ends
    RESERVED = "reserved"  # blocks wait for KV from another worker
    ENDED = "ended"


class SequenceEvent(StrEnum):
    SUPPLIED = "supplied"
    ADMITTED = "admitted"
    PREEMPTED = "preempted"
    PREFILLED = "prefilled"
    KEPT = "kept"
    ACTIVATED = "activated"
    ENDED = "ended"


_S, _E = SequenceState, SequenceEvent
EDGES: Mapping[SequenceState, Mapping[SequenceEvent, SequenceState]] = MappingProxyType(
    {
        _S.UNREADY: {
            _E.SUPPLIED: _S.WAITING,  # the grammar is here
            _E.ENDED: _S.ENDED,  # aborted, or there is no such grammar
        },
        _S.WAITING: {
            _E.ADMITTED: _S.RUNNING,  # its turn came and its blocks were there
            _E.ENDED: _S.ENDED,  # aborted in the queue
        },
        _S.RUNNING: {
            _E.PREEMPTED: _S.WAITING,  # an older request needed its blocks
            _E.PREFILLED: _S.LEASED,  # first token sampled, the KV is to be handed over
            _E.ENDED: _S.ENDED,  # finished or aborted
        },
        _S.LEASED: {
            _E.KEPT: _S.WAITING,  # there is no hand-off: it goes on here
            _E.ENDED: _S.ENDED,  # the hand-off ended, well or not
        },
        _S.RESERVED: {
            _E.ACTIVATED: _S.RUNNING,  # the KV has landed
            _E.ENDED: _S.ENDED,  # it never came, or the request was aborted
        },
        _S.ENDED: {},
    }
)


class TokenSequence:
    """Tokens and blocks of one request.

    Attributes:
        arrival: order of acceptance; smaller is older and goes first.
        max_tokens: prompt plus output at the very most.
        tokens: prompt, then what was generated.
        num_computed: leading tokens that need no computing: their KV is in the pool, or was dropped.
        num_dropped: prompt tokens whose KV was left out of the hand-off. The KV of the others is moved together, so a
            generated token's place in the pool is its position less this.
        block_table: int32, the blocks of positions 0.. in order; only the first `num_blocks` are meant.
        chain: cache entries held, one per leading full block. Block i of the table is either lent by entry i or, when
            the same prefix was cached by somebody else meanwhile, a private copy.
        is_prefill: leaves the batch after its first token.
        is_shareable: its KV is exact, so full blocks may enter the prefix cache.
        cached_tokens: prompt tokens found in the cache when it was last admitted or reserved.
        window_queries: [L, W, H, D] queries of the last prompt tokens, when they are kept for scores.
        scores: of the prompt, when they were asked for and are to be computed here; until they have been told.
        grammar: what its constraint was compiled to, once it was supplied.
        walk: its way through the grammar; it has taken every generated token.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        arrival: int,
        state: SequenceState,
        block_size: int,
        max_tokens: int,
        namespace: bytes,
        sampling: SamplingState,
        stops: StopChecker,
        is_prefill: bool = False,
    ) -> None:
        """
        Args:
            namespace: root of the request's hash chain.
        """
        self.request = request
        self.request_id = request.request_id
        self.arrival = arrival
        self.state = state
        self.num_prompt_tokens = request.num_prompt_tokens
        self.max_tokens = max_tokens
        self.tokens = list(request.prompt_token_ids)
        self.num_computed = 0
        self.num_dropped = 0
        self.block_table: NDArray[np.int32] = np.zeros(num_blocks(max_tokens, block_size), np.int32)
        self.num_blocks = 0
        self.chain: list[CacheEntry] = []
        self.sampling = sampling
        self.stops = stops
        self.is_prefill = is_prefill
        self.is_shareable = True
        self.cached_tokens = 0
        self.window_queries: torch.Tensor | None = None
        self.scores: PromptScores | None = None
        if request.sampling.prompt_logprobs is not None and state is not SequenceState.RESERVED:
            self.scores = PromptScores(request.prompt_token_ids, request.sampling.prompt_logprobs)
        self.num_preemptions = 0
        self.grammar: Grammar | None = None
        self.walk: Walk | None = None
        self._block_size = block_size
        self._namespace = namespace
        given = request.block_hashes
        self._hashes = list(given) if len(given) == self.num_prompt_tokens // block_size else []

    def handle(self, event: SequenceEvent) -> None:
        """Move along an edge.

        Raises:
            InvalidTransition: there is none; nothing changed.
        """
        after = EDGES[self.state].get(event)
        if after is None:
            raise InvalidTransition("sequence", self.state, event)
        self.state = after

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def has_grammar(self) -> bool:
        """It has the grammar that its constraint needs, or no constraint."""
        return (self.request.sampling.constraint is None) is (self.grammar is None)

    @property
    def is_held(self) -> bool:
        """Its next token cannot be chosen in the step that is planned now: what may follow is not known yet."""
        return self.walk is not None and self.walk.is_held

    @property
    def num_places(self) -> int:
        """Places in the pool that its known tokens need."""
        return len(self.tokens) - self.num_dropped

    @property
    def is_scored_well(self) -> bool:
        """What was computed of its prompt's scores, if anything, are numbers."""
        return self.scores is None or self.scores.are_finite

    def take_scores(self) -> tuple[PromptToken, ...]:
        """Return the prompt's scores, if there are any, once."""
        scores, self.scores = self.scores, None
        return scores.result() if scores is not None else ()

    @property
    def num_reusable(self) -> int:
        """Leading tokens whose KV may be taken from the prefix cache when it waits for its turn.

        At least one token is computed: without it there would be no logits. A shared block is never written, so the
        block of that token is not taken from the cache even if it is there.
        """
        return min(len(self.tokens) - 1, len(self.tokens) if self.scores is None else self.scores.num_known)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def is_preemptible(self) -> bool:
        """A prefill for a hand-off is not: its KV is being sent while it is computed, and it never grows."""
        return not self.is_prefill

    def push(self, token_id: int) -> Finish | None:
        """Append a generated token to all that keeps count of them; return the end if it is one."""
        self.tokens.append(token_id)
        self.sampling.add(token_id)
        return self.stops.push(token_id)

    def hashes(self, count: int) -> list[bytes]:
        """Return the chained hashes of the first `count` blocks, all full of known tokens."""
        known = self._hashes
        while len(known) < count:
            start = len(known) * self._block_size
            known.append(extend_hash(self.parent_hash(len(known)), self.tokens[start : start + self._block_size]))
        return known[:count]

    def parent_hash(self, block_idx: int) -> bytes:
        """Return the hash before block `block_idx`."""
        return self._hashes[block_idx - 1] if block_idx else self._namespace

    def append_blocks(self, block_ids: list[int]) -> None:
        """Extend the block table."""
        end = self.num_blocks + len(block_ids)
        self.block_table[self.num_blocks : end] = block_ids
        self.num_blocks = end

    def private_blocks(self) -> list[int]:
        """Return the blocks of the table that no cache entry lends."""
        table = self.block_table[: self.num_blocks].tolist()
        lent = [entry.block_id for entry in self.chain]
        return [block for at, block in enumerate(table) if at >= len(lent) or lent[at] != block]
