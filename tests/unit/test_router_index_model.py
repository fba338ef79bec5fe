"""The prefix index against naive models of it: sets of prefixes per worker, and the workers' own caches."""

import math
from collections import OrderedDict
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.blocks import block_hashes
from core.ids import WorkerId
from core.kv_events import BlocksStored, Tier
from router.index.prefix_index import TICK_S, PrefixIndex
from router.index.slots import WorkerSlots

ROOT = b"r" * 16
WORKERS = [WorkerId(name) for name in "abc"]
Prefix = tuple[int, ...]

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
workers = st.sampled_from(WORKERS)
tiers = st.sampled_from(list(Tier))


def hashes_of(tokens: Prefix) -> tuple[bytes, ...]:
    return block_hashes(tokens, 1, ROOT)


def prefixes(tokens: Prefix) -> list[Prefix]:
    return [tokens[: depth + 1] for depth in range(len(tokens))]


class Held:
    """What one worker holds, prefix by prefix, with the rules of the index written down plainly."""

    def __init__(self) -> None:
        self.device: set[Prefix] = set()
        self.host: set[Prefix] = set()
        self.coming: dict[Prefix, int] = {}

    def store(self, tokens: Prefix, tier: Tier) -> None:
        for prefix in prefixes(tokens):
            if tier is Tier.DEVICE:
                self.device.add(prefix)
                self.coming.pop(prefix, None)
            else:
                self.host.add(prefix)

    def predict(self, tokens: Prefix, tick: int) -> None:
        for prefix in prefixes(tokens):
            if prefix not in self.device:
                self.coming[prefix] = max(tick, self.coming.get(prefix, tick))

    def withdraw(self, tokens: Prefix, kept: int) -> None:
        for prefix in prefixes(tokens)[kept:]:
            if prefix not in self.device:
                self.coming = {one: until for one, until in self.coming.items() if one[: len(prefix)] != prefix}

    def remove(self, block: Prefix, tier: Tier) -> None:
        if tier is Tier.HOST:
            if block not in self.host:
                return
            self.host.discard(block)
            if block not in self.device:
                self.coming.pop(block, None)
        elif block in self.device or block in self.coming:
            for prefix in [*self.device, *self.coming]:
                if prefix[: len(block)] == block:
                    self.device.discard(prefix)
                    self.coming.pop(prefix, None)
        self._drop_what_hangs(block)

    def _drop_what_hangs(self, block: Prefix) -> None:
        """Below `block`, what has a block above it that is in neither tier cannot be used."""
        for prefix in sorted({*self.device, *self.host, *self.coming}, key=len):
            if len(prefix) <= len(block) or prefix[: len(block)] != block:
                continue
            if any(above not in self.device | self.host for above in prefixes(prefix)[len(block) - 1 : -1]):
                self.device.discard(prefix)
                self.host.discard(prefix)
                self.coming.pop(prefix, None)

    def replace(self, chains: Sequence[tuple[Prefix, Tier]]) -> None:
        coming, self.device, self.host, self.coming = self.coming, set(), set(), {}
        for tokens, tier in chains:
            self.store(tokens, tier)
        for prefix in sorted(coming, key=len):
            if prefix not in self.device and (len(prefix) == 1 or prefix[:-1] in self.device | self.coming.keys()):
                self.coming[prefix] = coming[prefix]

    def expire(self, tick: int) -> None:
        self.coming = {prefix: until for prefix, until in self.coming.items() if until > tick}

    def depth(self, tokens: Prefix, tier: Tier) -> int:
        usable = self.device | self.coming.keys() | (self.host if tier is Tier.HOST else set())
        return next((depth for depth, prefix in enumerate(prefixes(tokens)) if prefix not in usable), len(tokens))


class IndexMachine(RuleBasedStateMachine):
    """An index that is never full equals the model."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = WorkerSlots()
        self.index = PrefixIndex(2**20, self.slots)
        self.model: dict[WorkerId, Held] = {}
        self.now = 0.0

    def held(self, worker: WorkerId) -> Held:
        return self.model.setdefault(worker, Held())

    @rule(worker=workers, tokens=prompts, tier=tiers)
    def store(self, worker: WorkerId, tokens: Prefix, tier: Tier) -> None:
        self.index.store(worker, hashes_of(tokens), tier)
        self.held(worker).store(tokens, tier)

    @rule(worker=workers, tokens=prompts, ttl_s=st.floats(0.1, 8.0))
    def predict(self, worker: WorkerId, tokens: Prefix, ttl_s: float) -> None:
        known = self.held(worker).depth(tokens, Tier.DEVICE)
        assert self.index.predict(worker, hashes_of(tokens), self.now, ttl_s) == known
        self.held(worker).predict(tokens, math.ceil((self.now + ttl_s) / TICK_S))

    @rule(worker=workers, tokens=prompts, kept=st.integers(0, 6))
    def withdraw(self, worker: WorkerId, tokens: Prefix, kept: int) -> None:
        self.index.withdraw(worker, hashes_of(tokens), kept)
        if worker in self.model:
            self.held(worker).withdraw(tokens, kept)

    @rule(worker=workers, tokens=prompts, tier=tiers)
    def remove(self, worker: WorkerId, tokens: Prefix, tier: Tier) -> None:
        self.index.remove(worker, hashes_of(tokens)[-1:], tier)
        if worker in self.model:
            self.held(worker).remove(tokens, tier)

    @rule(wait_s=st.floats(0.0, 4.0))
    def expire(self, wait_s: float) -> None:
        self.now += wait_s
        self.index.expire(self.now)
        for held in self.model.values():
            held.expire(math.floor(self.now / TICK_S))

    @rule(worker=workers, chains=st.lists(st.tuples(prompts, tiers), max_size=3))
    def replace(self, worker: WorkerId, chains: list[tuple[Prefix, Tier]]) -> None:
        self.index.replace(worker, [BlocksStored(ROOT, hashes_of(tokens), tier) for tokens, tier in chains])
        self.held(worker).replace(chains)

    @rule(worker=workers)
    def forget(self, worker: WorkerId) -> None:
        self.index.forget(worker)
        self.model.pop(worker, None)

    @rule(worker=workers)
    def leave(self, worker: WorkerId) -> None:
        self.forget(worker)
        self.slots.release(worker)

    @rule(budget=st.integers(1, 20))
    def sweep(self, budget: int) -> None:
        self.index.sweep(budget)

    @rule(tokens=prompts)
    def match(self, tokens: Prefix) -> None:
        match = self.index.match(hashes_of(tokens))
        for tier in Tier:
            depths = {worker: held.depth(tokens, tier) for worker, held in self.model.items()}
            assert match.holders(tier) == {worker: depth for worker, depth in depths.items() if depth}

    @precondition(lambda self: not self.model)
    @rule()
    def sweep_leaves_nothing(self) -> None:
        while self.index.sweep(100):
            pass
        assert len(self.index) == 0

    @invariant()
    def is_consistent(self) -> None:
        self.index.check()
        self.slots.check()


class Cache:
    """A worker's prefix cache: LRU, no block without those above it. Tells what it stored and removed."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.blocks: OrderedDict[Prefix, None] = OrderedDict()  # least recently used first, deepest first

    def use(self, tokens: Prefix) -> tuple[int, list[Prefix]]:
        """Return how many blocks were there, and those that had to go."""
        known = next((i for i, prefix in enumerate(prefixes(tokens)) if prefix not in self.blocks), len(tokens))
        for prefix in reversed(prefixes(tokens)):
            self.blocks[prefix] = None
            self.blocks.move_to_end(prefix)
        removed = []
        while len(self.blocks) > self._capacity:
            removed.append(self.blocks.popitem(last=False)[0])
        return known, removed


class FollowingMachine(RuleBasedStateMachine):
    """Fed by the events of real caches and smaller than they are, the index never claims what a worker has not."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(PrefixIndex.bytes_for(12), WorkerSlots())
        self.caches = {worker: Cache(10) for worker in WORKERS}
        self.promised: dict[WorkerId, set[Prefix]] = {worker: set() for worker in WORKERS}
        self.now = 0.0

    @rule(worker=workers, tokens=prompts)
    def serve(self, worker: WorkerId, tokens: Prefix) -> None:
        known, removed = self.caches[worker].use(tokens)
        hashes = hashes_of(tokens)
        if known < len(tokens):
            self.index.store(worker, hashes[known:], parent=hashes[known - 1] if known else ROOT)
        self.index.remove(worker, [hashes_of(prefix)[-1] for prefix in removed])

    @rule(worker=workers, tokens=prompts)
    def predict(self, worker: WorkerId, tokens: Prefix) -> None:
        self.index.predict(worker, hashes_of(tokens), self.now, 1.0)
        self.promised[worker].update(prefixes(tokens))

    @rule()
    def expire(self) -> None:
        self.now += 3.0
        self.index.expire(self.now)
        for promised in self.promised.values():
            promised.clear()

    @rule(worker=workers, budget=st.integers(1, 10))
    def restart(self, worker: WorkerId, budget: int) -> None:
        self.index.forget(worker)
        self.caches[worker] = Cache(10)
        self.promised[worker].clear()
        self.index.sweep(budget)

    @rule(tokens=prompts)
    def match(self, tokens: Prefix) -> None:
        for worker, depth in self.index.match(hashes_of(tokens)).holders().items():
            assert all(self.has(worker, prefix) for prefix in prefixes(tokens)[:depth])

    def has(self, worker: WorkerId, prefix: Prefix) -> bool:
        return prefix in self.caches[worker].blocks or prefix in self.promised[worker]

    @invariant()
    def is_consistent(self) -> None:
        self.index.check()


class WideMachine(FollowingMachine):
    """With room for all of them, it says exactly what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(2**20, WorkerSlots())

    @precondition(lambda self: not any(self.promised.values()))
    @rule(tokens=prompts)
    def match(self, tokens: Prefix) -> None:
        holders = self.index.match(hashes_of(tokens)).holders()
        for worker in WORKERS:
            there = [prefix in self.caches[worker].blocks for prefix in prefixes(tokens)]
            assert holders.get(worker, 0) == (there.index(False) if False in there else len(there))


_SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None)
for machine in (IndexMachine, FollowingMachine, WideMachine):
    machine.TestCase.settings = _SETTINGS
TestIndexMachine = IndexMachine.TestCase
TestFollowingMachine = FollowingMachine.TestCase
TestWideMachine = WideMachine.TestCase


def test_the_models_are_closed_towards_the_root() -> None:
    held = Held()
    held.store((1, 2, 3), Tier.HOST)
    held.store((1, 2), Tier.DEVICE)
    held.remove((1,), Tier.HOST)
    assert held.depth((1, 2, 3), Tier.HOST) == 3
    held.remove((1,), Tier.DEVICE)
    assert held.depth((1, 2, 3), Tier.HOST) == 0
    cache = Cache(3)
    sequence: Sequence[Prefix] = [(1, 2), (1, 3), (4,)]
    assert [cache.use(tokens) for tokens in sequence] == [(0, []), (1, []), (0, [(1, 2)])]
