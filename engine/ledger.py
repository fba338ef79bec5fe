"""Gives sequences their blocks and takes them back: the one place where block tables, cache loans and owners meet.

Invariant, asserted by `check`: every block is free, cached, or in the table of exactly one sequence (as a private
block), whose state says which owner it has. Only the engine thread calls this.
"""

from collections.abc import Iterable

from core.blocks import num_blocks
from engine.blocks import BlockManager, Owner
from engine.prefix_cache import PrefixCache
from engine.sequence import SequenceState, TokenSequence

_OWNER = {
    SequenceState.RUNNING: Owner.REQUEST,
    SequenceState.LEASED: Owner.LEASE,
    SequenceState.RESERVED: Owner.LEASE,
}


class KvLedger:
    """Block tables of sequences over one pool and one prefix cache."""

    def __init__(self, blocks: BlockManager, cache: PrefixCache, block_size: int) -> None:
        self.blocks = blocks
        self.cache = cache
        self.block_size = block_size

    @property
    def num_available(self) -> int:
        """Blocks that could be taken now, idle cache entries included."""
        return self.blocks.num_free + self.cache.num_idle

    def cached_tokens(self, sequence: TokenSequence) -> int:
        """Return how many of its tokens would be taken from the cache now."""
        return len(self.cache.match(sequence.hashes(sequence.num_reusable // self.block_size))) * self.block_size

    def missing_blocks(self, sequence: TokenSequence) -> int:
        """Return how many blocks more its known tokens need."""
        return max(0, num_blocks(sequence.num_places, self.block_size) - sequence.num_blocks)

    def admit(
        self, sequence: TokenSequence, *, num_tokens: int, max_cached_tokens: int, headroom: int, owner: Owner
    ) -> bool:
        """Give a sequence that holds nothing blocks for `num_tokens`, as many of them as can be from the cache.

        Args:
            max_cached_tokens: use no more than this from the cache.
            headroom: blocks that must remain available.
        Returns:
            False when there are not enough; nothing changed then.
        """
        assert sequence.num_blocks == len(sequence.chain) == 0
        found = self.cache.match(sequence.hashes(max_cached_tokens // self.block_size))
        wanted = num_blocks(num_tokens, self.block_size) - len(found)
        idle_found = sum(entry.references == 0 for entry in found)
        if wanted + headroom > self.num_available - idle_found:
            return False
        self.cache.acquire(found)
        sequence.chain = found
        sequence.append_blocks([entry.block_id for entry in found])
        sequence.append_blocks(self._take(wanted, owner))
        sequence.num_computed = sequence.cached_tokens = len(found) * self.block_size
        return True

    def grow(self, sequence: TokenSequence) -> None:
        """Give a running sequence the blocks that it misses; they must be available."""
        sequence.append_blocks(self._take(self.missing_blocks(sequence), Owner.REQUEST))

    def index(self, sequence: TokenSequence) -> None:
        """Hand every full computed block that is not cached yet to the cache, which lends it back."""
        full = sequence.num_computed // self.block_size
        if not sequence.is_shareable or full <= len(sequence.chain):
            return
        hashes = sequence.hashes(full)
        for at in range(len(sequence.chain), full):
            block_id = int(sequence.block_table[at])
            entry = self.cache.insert(hashes[at], sequence.parent_hash(at), at, block_id)
            if entry is None:
                return  # the cache is full of lent blocks: this and the following ones stay private
            sequence.chain.append(entry)

    def drop(self, sequence: TokenSequence, num_tokens: int) -> None:
        """Take note that so many prompt tokens of a running sequence have no KV, and free the blocks that it spares."""
        sequence.num_dropped = num_tokens
        needed = num_blocks(sequence.num_places, self.block_size)
        assert needed >= len(sequence.chain), "held prefixes are whole"
        spared = sequence.block_table[needed : sequence.num_blocks].tolist()
        self.blocks.free(spared, _OWNER[sequence.state])
        sequence.num_blocks = min(sequence.num_blocks, needed)

    def change_owner(self, sequence: TokenSequence, after: Owner) -> None:
        """Tell the owner of the private blocks that the sequence's state is about to change (or has been left)."""
        self.blocks.transfer(sequence.private_blocks(), _OWNER[sequence.state], after)

    def release(self, sequence: TokenSequence, owner: Owner | None = None) -> None:
        """Take everything back: private blocks to the free list, loans to the cache.

        Args:
            owner: of the private blocks; by default the one that goes with the sequence's state.
        """
        if sequence.num_blocks:
            self.blocks.free(sequence.private_blocks(), _OWNER[sequence.state] if owner is None else owner)
            self.cache.release(sequence.chain)
        sequence.chain = []
        sequence.num_blocks = 0
        sequence.num_computed = 0
        sequence.num_dropped = 0

    def reclaimable(self, sequence: TokenSequence) -> int:
        """Return at least how many blocks become available when this sequence is released."""
        return len(sequence.private_blocks()) + sum(entry.references == 1 for entry in sequence.chain)

    def check(self, holders: Iterable[TokenSequence], quarantined: Iterable[TokenSequence]) -> None:
        """Assert that every block has exactly one owner, given every sequence that holds any."""
        self.blocks.check()
        owned: dict[int, Owner] = {}
        quarantined = list(quarantined)
        holders = list(holders)
        for sequence, owner in [
            *((sequence, _OWNER.get(sequence.state)) for sequence in holders),
            *((sequence, Owner.QUARANTINE) for sequence in quarantined),
        ]:
            assert owner is not None or sequence.num_blocks == 0, f"a {sequence.state} sequence holds blocks"
            for block_id in sequence.private_blocks():
                assert block_id not in owned, "a block is in two tables"
                assert self.blocks.owner(block_id) is owner
                owned[block_id] = self.blocks.owner(block_id)
        total = {owner: sum(kept is owner for kept in owned.values()) for owner in Owner}
        for owner in (Owner.REQUEST, Owner.LEASE, Owner.QUARANTINE):
            assert self.blocks.count(owner) == total[owner], f"{owner.name} owns blocks that no sequence has"
        self.cache.check([sequence.chain for sequence in (*holders, *quarantined)])

    def _take(self, count: int, owner: Owner) -> list[int]:
        short = count - self.blocks.num_free
        if short > 0:
            self.cache.evict(short)
        return self.blocks.allocate(count, owner)
