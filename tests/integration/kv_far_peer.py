"""The other process of the KV transfer tests: a decode worker's end that says on stdout what happens to it.

``python -m tests.integration.kv_far_peer receiver`` serves until its stdin ends. It reserves what it is told on stdin,
one JSON object per line, and reports outcomes, with a digest of what landed, as JSON lines on stdout.
``... sender <address>`` offers one endless transfer there, and is killed by the test.
"""

import asyncio
import hashlib
import json
import sys
import threading

from core.clock import MonotonicClock
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.membership import WorkerIdentity
from core.rpc import bind, create_server
from kv_transfer.config import KvTransferConfig
from kv_transfer.ports import LandedStats, Peer
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.rpc import add_kv_transfer
from kv_transfer.sender.sender import KvSender
from tests.kv_peers import LAYOUT, ArrayPool

CONFIG = KvTransferConfig(backend="gloo", slot_bytes=65536, credit_bytes=262144)


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


class SayingOutcomes:
    def __init__(self, pool: ArrayPool) -> None:
        self._pool = pool

    def on_acked(self, transfer_id: TransferId) -> None:
        say(outcome="acked", transfer_id=transfer_id)

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        array = self._pool.arrays[RequestId(transfer_id)]
        digest = hashlib.sha256(array.numpy().tobytes()).hexdigest()
        say(outcome="landed", transfer_id=transfer_id, digest=digest, first_token_id=first_token_id)

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        say(outcome=reason, transfer_id=transfer_id, detail=detail)


async def serve() -> None:
    pool = ArrayPool()
    receiver = KvReceiver(
        CONFIG, WorkerIdentity(WorkerId("far"), Epoch(2), "test"), LAYOUT, pool, SayingOutcomes(pool), MonotonicClock()
    )
    server = create_server()
    add_kv_transfer(receiver, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    say(address=f"127.0.0.1:{port}")
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line)
        loop.call_soon_threadsafe(lines.put_nowait, "")

    threading.Thread(target=listen, daemon=True).start()
    while line := await lines.get():
        order = json.loads(line)
        name, num_tokens = order["name"], order["num_tokens"]
        pool.clear(RequestId(name), num_tokens)
        if order.get("is_stuck"):
            pool.blocked_by = threading.Event()  # never set: the receiver thread stays inside the pool
        await receiver.expect(TransferId(name), RequestId(name), order["held_tokens"], num_tokens)
        say(expected=name)
    await receiver.close()
    await server.stop(1.0)
    say(closed=True)


async def send_for_ever(address: str) -> None:
    pool = ArrayPool()
    outcomes = SayingOutcomes(pool)
    identity = WorkerIdentity(WorkerId("far"), Epoch(2), "test")
    sender = KvSender(CONFIG, identity, LAYOUT, pool, outcomes, MonotonicClock())
    num_tokens = 1_000_000
    pool.fill(RequestId("endless"), 1000)
    await sender.offer(
        TransferId("endless"), RequestId("endless"), num_tokens, Peer(WorkerId("near"), Epoch(1), address)
    )
    sender.push(TransferId("endless"), range(LAYOUT.num_layers), range(900))
    say(pushed=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve() if sys.argv[1] == "receiver" else send_for_ever(sys.argv[2]))
