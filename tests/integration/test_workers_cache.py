"""What a worker tells of its prefix cache: events in the store, snapshots on demand, and how they fit together."""

import asyncio

from core.kv_events import BlocksRemoved, BlocksStored
from core.membership import kv_event_stream
from core.store import STREAM_START
from protos import codec, worker_pb2
from tests.worker_pair import D, P, Pair, request, worker_pair
from tests.worker_side import PATIENCE_S


async def held_by_events(pair: Pair, worker_id: str, sequence: int) -> set[bytes]:
    """Return what a reader of the event stream believes after batch `sequence`."""
    held: set[bytes] = set()
    last, key = STREAM_START, kv_event_stream("test", worker_id)  # type: ignore[arg-type]
    seen = 0
    async with asyncio.timeout(PATIENCE_S):
        while seen < sequence:
            found = await pair.store.read({key: last}, max_entries=100, wait_s=PATIENCE_S)
            for entry in found.get(key, []):
                last = entry.entry_id
                batch = codec.kv_events_from_wire(worker_pb2.KvEventBatch.FromString(entry.value))
                if batch.sequence > sequence:
                    break
                assert batch.sequence == seen + 1
                seen = batch.sequence
                for event in batch.events:
                    if isinstance(event, BlocksStored):
                        held.update(event.hashes)
                    elif isinstance(event, BlocksRemoved):
                        held.difference_update(event.hashes)
                    else:
                        held.clear()
    return held


async def test_a_snapshot_of_the_cache_says_what_the_events_up_to_its_number_say() -> None:
    async with worker_pair(num_blocks=24) as pair:
        for n in range(8):  # more than the pool holds, so that blocks are evicted too
            await pair.generate(request(f"r{'x' * n}", 20))
        for stream, worker_id in ((pair.to_prefill, P), (pair.to_decode, D)):
            snapshot = await stream.list_cached_blocks()
            assert (snapshot.worker_id, snapshot.epoch) == (worker_id, 3)
            held = {digest for chain in snapshot.chains for digest in chain.hashes}
            assert held
            assert held == await held_by_events(pair, worker_id, snapshot.sequence)


async def test_a_snapshot_includes_what_happened_right_before_it_and_so_does_its_number() -> None:
    async with worker_pair() as pair:
        await pair.generate(request("a", 20))
        pair.prefill_side.computing.close()
        await pair.submit(request("bb", 20))
        await pair.prefill_side.computing.until_reached()
        parts = pair.prefill._parts
        assert parts is not None
        evicted = parts.engine.call(lambda engine: engine._ledger.cache.evict(1))  # both wait for the step, in order
        listing = asyncio.create_task(pair.prefill.list_cached_blocks())
        await asyncio.sleep(0)
        pair.prefill_side.computing.open()
        sequence, chains = await listing
        assert evicted.result() == 1
        assert {digest for chain in chains for digest in chain.hashes} == await held_by_events(pair, P, sequence)
