"""The byte cap of the prefix index holds for the process's resident memory, not only for what the index counts."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CAP = 48 * 2**20
CHURN = """
import json, random, psutil
from core.ids import WorkerId
from core.kv_events import Tier
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots

PrefixIndex(2**20, WorkerSlots())
process, rng = psutil.Process(), random.Random(0)
empty = process.memory_info().rss
slots = WorkerSlots()
index = PrefixIndex({cap}, slots)
grown, number = [], 0
while len(grown) < 8:
    for _ in range(index.max_blocks // 200):
        number += 1
        packed = rng.randbytes(1600)
        hashes = tuple(packed[at : at + 16] for at in range(0, 1600, 16))
        worker, now = WorkerId(f"w{{number % 150}}"), number * 1e-3
        index.observe(hashes, now)
        index.match(hashes).blocks(Tier.DEVICE, slots.capacity)
        index.predict(worker, hashes, now, 3.0)
        index.store(worker, hashes[: rng.randrange(101)], rng.choice([*Tier]))
        if number % 97 == 0:
            index.forget(worker)
            slots.release(worker)
        if number % 50 == 0:
            index.expire(now)
            index.sweep(20_000)
    grown.append(process.memory_info().rss - empty)
index.check()
print(json.dumps([grown, index.num_bytes, len(index), index.max_blocks]))
"""


def test_resident_memory_is_flat_below_the_cap_under_churn() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHURN.format(cap=CAP)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, counted, num_blocks, max_blocks = json.loads(done.stdout)
    assert num_blocks > 0.9 * max_blocks, "four times as many blocks came as it keeps"
    assert counted <= CAP
    assert max(grown) <= CAP
    assert abs(counted - grown[-1]) < 0.15 * CAP, "what it counts is what it takes"
    assert max(grown[4:]) - min(grown[4:]) < 0.03 * CAP, "flat once it is full"
