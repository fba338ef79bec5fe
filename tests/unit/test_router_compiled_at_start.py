"""A gateway compiles before it serves: a loop that is compiled or loaded later stops every request meanwhile."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import random
from numba.core.dispatcher import Dispatcher
import router.index.rewrites, router.index.table
import router.routing.fit, router.routing.prices, router.routing.search, router.routing.transfer
from core.kv_events import Tier
from router.index.prefix_index import MIN_BYTES, PrefixIndex
from tests.routing_world import World, WorkerId, load_report

MODULES = (
    router.index.rewrites, router.index.table,
    router.routing.fit, router.routing.prices, router.routing.search, router.routing.transfer,
)

def loaded():
    found = {}
    for module in MODULES:
        for name, function in vars(module).items():
            if isinstance(function, Dispatcher):
                found[f"{module.__name__}.{name}"] = len(function.signatures)
    return found

world = World("p0", "p1", "d0", "d1")
index = PrefixIndex(MIN_BYTES + 16 * 4096, world.table.slots)
before = loaded()
for at in range(64):
    chain = tuple(bytes([at + 1, block + 1]) * 8 for block in range(20))
    index.observe(chain, 1.0 * at)
    index.match(chain)
    index.withdraw(WorkerId("p1"), chain, index.predict(WorkerId("p1"), chain, 1.0 * at, 5.0) + at % 2)
    index.store(WorkerId("p0"), chain)
    index.store(WorkerId("p0"), chain[:9], Tier.HOST)
    index.store(WorkerId("p1"), chain[4:8], parent=chain[3])
    index.remove(WorkerId("p0"), chain[5:])
    index.remove(WorkerId("p0"), chain[2:9], Tier.HOST)
index.forget(WorkerId("p1"))
index.sweep(1000)
world.models.observe_prefill(WorkerId("p0"), 100, 0, 0.1)
world.models.observe_load(WorkerId("d0"), load_report(num_running=2, context_tokens=50, decode_step_s=0.01))
world.place()
after = loaded()
print(*(name for name in after if after[name] > before[name]))
"""


def test_nothing_is_compiled_once_requests_come() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
