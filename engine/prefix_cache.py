"""Full blocks of KV that later requests with the same prefix can use again.

An entry is keyed by the chained hash of its tokens and everything before them (`core.blocks`), so a lookup walks a
request's hashes until the first miss. Entries are lent under reference counts; whoever holds one holds all entries
before it in the chain. Entries that nobody holds are kept in the order in which they were last given back, and are
evicted from its old end. A chain is given back from its end to its beginning, so a leaf is always evicted before its
parent, and what remains can be found.

Every change is reported as an event, from which a router mirrors the cache. Only the engine thread calls this.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent
from engine.blocks import BlockManager, Owner

_MAX_PENDING_EVENTS = 16_384


@dataclass(slots=True, eq=False)
class CacheEntry:
    """One cached block.

    Attributes:
        digest: chained hash up to and including this block.
        parent: hash before it; the namespace root for a first block.
        depth: its index in the chain; 0 for a first block.
        references: requests and leases that hold it.
    """

    digest: bytes
    parent: bytes
    depth: int
    block_id: int
    references: int


class PrefixCache:
    """The index, the loans and the eviction order; block ownership is told to the `BlockManager`."""

    def __init__(self, blocks: BlockManager, *, max_blocks: int) -> None:
        """
        Args:
            max_blocks: cap of what the cache may own, lent blocks included; 0 caches nothing.
        """
        self._blocks = blocks
        self._max_blocks = max_blocks
        self._entries: dict[bytes, CacheEntry] = {}
        self._idle: OrderedDict[bytes, CacheEntry] = OrderedDict()  # oldest first
        self._events: list[KvEvent] = []
        self._open_chain: list[bytes] = []  # of the newest event, while it may still grow: parent, then hashes
        self._has_lost_events = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_idle(self) -> int:
        """Entries that could be evicted now."""
        return len(self._idle)

    def match(self, hashes: Sequence[bytes]) -> list[CacheEntry]:
        """Return the entries of the leading blocks that are cached. Takes no reference."""
        found = []
        for digest in hashes:
            entry = self._entries.get(digest)
            if entry is None:
                break
            found.append(entry)
        return found

    def acquire(self, chain: Sequence[CacheEntry]) -> None:
        """Take one reference on each of these entries, just returned by `match`."""
        for entry in chain:
            self._hold(entry)

    def insert(self, digest: bytes, parent: bytes, depth: int, block_id: int) -> CacheEntry | None:
        """Make a computed block of a request or a lease reusable, and lend it on to its holder.

        Args:
            digest, parent, depth: as in `CacheEntry`; the caller holds the entries before.
            block_id: its block, owned by the caller.
        Returns:
            The entry with one more reference. Its block is another than `block_id` when the same prefix was cached
            before: then the caller keeps its own block. None when the cap is reached and everything is lent.
        """
        entry = self._entries.get(digest)
        if entry is not None:
            self._hold(entry)
            return entry
        assert (parent in self._entries) == (depth > 0), "the chain before is not cached"
        if len(self._entries) >= self._max_blocks and not self.evict(1):
            return None
        self._blocks.transfer((block_id,), self._blocks.owner(block_id), Owner.CACHE)
        entry = CacheEntry(digest, parent, depth, block_id, references=1)
        self._entries[digest] = entry
        if self._open_chain and self._open_chain[-1] == parent:
            self._open_chain.append(digest)
        else:
            self._close_chain()
            self._open_chain = [parent, digest]
        return entry

    def release(self, chain: Sequence[CacheEntry]) -> None:
        """Give back one reference on each entry of a chain (in chain order)."""
        for entry in reversed(chain):
            assert entry.references > 0
            entry.references -= 1
            if entry.references == 0:
                self._idle[entry.digest] = entry

    def evict(self, count: int) -> int:
        """Free up to `count` blocks that nobody holds, the longest idle first; return how many."""
        removed: list[bytes] = []
        while len(removed) < count and self._idle:
            digest, entry = self._idle.popitem(last=False)
            del self._entries[digest]
            self._blocks.free((entry.block_id,), Owner.CACHE)
            removed.append(digest)
        if removed:
            self._close_chain()
            self._record(BlocksRemoved(tuple(removed)))
        return len(removed)

    def take_events(self) -> list[KvEvent]:
        """Return what changed since the last call. If nobody asked for long: everything, after a `CacheCleared`."""
        self._close_chain()
        events, self._events = self._events, []
        if self._has_lost_events:
            self._has_lost_events = False
            return [CacheCleared(), *self.snapshot()]
        return events

    def snapshot(self) -> list[BlocksStored]:
        """Return the whole cache as chains, parents first."""
        children: dict[bytes, list[bytes]] = {}
        for entry in self._entries.values():
            children.setdefault(entry.parent, []).append(entry.digest)
        heads = deque(
            (parent, digest) for parent in children if parent not in self._entries for digest in children[parent]
        )
        chains = []
        while heads:
            parent, digest = heads.popleft()
            chain = [digest]
            while len(following := children.get(chain[-1], [])) == 1:
                chain.append(following[0])
            heads.extend((chain[-1], branch) for branch in children.get(chain[-1], []))
            chains.append(BlocksStored(parent, tuple(chain)))
        return chains

    def check(self, held: Sequence[Sequence[CacheEntry]]) -> None:
        """Assert every invariant, given the chains of all holders."""
        references = dict.fromkeys(self._entries, 0)
        for chain in held:
            for entry in chain:
                assert self._entries.get(entry.digest) is entry, "a held entry was evicted"
                references[entry.digest] += 1
        block_ids = {entry.block_id for entry in self._entries.values()}
        assert len(block_ids) == len(self._entries) == self._blocks.count(Owner.CACHE)
        position = {digest: at for at, digest in enumerate(self._idle)}
        for digest, entry in self._entries.items():
            assert entry.references == references[digest], "reference count is wrong"
            assert (entry.references == 0) == (digest in self._idle)
            assert self._blocks.owner(entry.block_id) is Owner.CACHE
            parent = self._entries.get(entry.parent)
            assert (parent is None) == (entry.depth == 0), "an entry can no longer be found"
            if parent is not None and parent.references == 0:
                assert entry.references == 0, "an entry is lent without its parent"
                assert position[digest] < position[parent.digest], "a parent would go first"

    def _hold(self, entry: CacheEntry) -> None:
        if entry.references == 0:
            del self._idle[entry.digest]
        entry.references += 1

    def _close_chain(self) -> None:
        """Make an event of the chain that grew until now."""
        if self._open_chain:
            parent, *hashes = self._open_chain
            self._open_chain = []
            self._record(BlocksStored(parent, tuple(hashes)))

    def _record(self, event: KvEvent) -> None:
        if len(self._events) >= _MAX_PENDING_EVENTS:
            self._events = []
            self._has_lost_events = True  # until asked, only the fact is kept; the answer is then the whole cache
        if not self._has_lost_events:
            self._events.append(event)
