"""The two processes of the link benchmark: paged pools, the raw gloo pair that is compared with, and the far side.

The far side is a slave: it takes commands over the raw pair (expect a transfer, take part in a raw send, stop), so that
all ways of moving bytes are measured in the same two processes, on the same clock, in turn.
"""

import asyncio
import json
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from benchmarks.link_ways import FarWay, FarWays, NearWay, open_near_ways
from core.clock import MonotonicClock
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from core.rpc import bind, create_server
from engine.pool import KvPool
from kv_transfer.config import KvTransferConfig
from kv_transfer.ports import LandedStats
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.rpc import add_kv_transfer

LAYOUT = KvLayout("benchmark", num_layers=16, num_kv_heads=4, head_dim=64, dtype="bfloat16", block_size=16)
MIB = 1024 * 1024
WAIT_S = 60.0
_NEAR, _FAR = 0, 1
_STOP, _RAW, _EXPECT, _WAY = range(4)
_WAYS = ("tcp", "carrier")


class PagedPool:
    """The engine's own pool behind a shuffled block table, full of noise."""

    def __init__(self, max_tokens: int, seed: int) -> None:
        num_blocks = -(-max_tokens // LAYOUT.block_size)
        generator = torch.Generator().manual_seed(seed)
        self._pool = KvPool(LAYOUT, num_blocks)
        self._pool.kv.view(torch.int16).random_(-(2**14), 2**14, generator=generator)
        self._table = torch.randperm(num_blocks, generator=generator)

    def read_kv(
        self,
        request_id: RequestId,
        layers: range,
        tokens: range,
        out: Tensor | None = None,
        heads: range | None = None,
    ) -> Tensor:
        return self._pool.read(self._table, layers, tokens, out)

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: Tensor, heads: range | None = None
    ) -> None:
        self._pool.write(self._table, layers, tokens, kv)

    def checksum(self) -> str:
        """Return a sum over all KV, the same wherever its blocks lie."""
        return str(self._pool.kv.view(torch.int16).to(torch.int64).sum().item())


class RawPair:
    """Two processes joined by one gloo group: what is compared with, and the road of the commands."""

    def __init__(self, role: Literal["near", "far"], port: int, raw_bytes: int) -> None:
        timeout = timedelta(seconds=WAIT_S)
        self.store = TCPStore("127.0.0.1", port, is_master=role == "near", wait_for_workers=False, timeout=timeout)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub calls it Options
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        rank = _NEAR if role == "near" else _FAR
        self._peer = 1 - rank
        self._group: Any = dist.ProcessGroupGloo(
            PrefixStore("raw", self.store), rank, 2, options
        )  # stubs lack send and recv
        self._payload = torch.ones(raw_bytes, dtype=torch.uint8)
        self._word = torch.zeros(2, dtype=torch.int64)

    def command(self, code: int, argument: int) -> None:
        self._send(torch.tensor([code, argument]), tag=1)

    def next_command(self) -> tuple[int, int]:
        self._receive(self._word, tag=1)
        code, argument = self._word.tolist()
        return code, argument

    def say_done(self) -> None:
        self._send(torch.zeros(1, dtype=torch.uint8), tag=2)

    def wait_done(self) -> None:
        self._receive(torch.zeros(1, dtype=torch.uint8), tag=2)

    def send_raw(self) -> None:
        """One gloo message of the whole payload, and the far side's word that it is there."""
        self._send(self._payload, tag=3)
        self.wait_done()

    def prepare_raw(self) -> None:
        self.command(_RAW, 0)
        self.wait_done()

    def receive_raw(self) -> None:
        work = self._group.recv([self._payload], self._peer, 3)
        self.say_done()  # posted
        work.wait(timedelta(seconds=WAIT_S))
        self.say_done()  # arrived

    def open_ways(self, config: KvTransferConfig) -> dict[str, NearWay]:
        """Near side: open the other ways to the far side."""
        return open_near_ways(config, json.loads(self.store.get("ways")))

    def send_over(self, way: NearWay) -> None:
        """The whole payload over another way; call `wait_done` afterwards."""
        way.send(self._payload)

    def prepare_way(self, name: str) -> None:
        self.command(_WAY, _WAYS.index(name))
        self.wait_done()

    def receive_over(self, way: FarWay) -> None:
        self.say_done()  # listening
        way.receive(self._payload)
        self.say_done()  # ready for the next command

    def expect(self, sequence: int, num_tokens: int) -> None:
        self.command(_EXPECT, sequence << 32 | num_tokens)
        self.wait_done()

    def stop(self) -> None:
        self.command(_STOP, 0)

    def _send(self, tensor: Tensor, tag: int) -> None:
        self._group.send([tensor], self._peer, tag).wait(timedelta(seconds=WAIT_S))

    def _receive(self, tensor: Tensor, tag: int) -> None:
        self._group.recv([tensor], self._peer, tag).wait(timedelta(seconds=WAIT_S))


@dataclass
class _Ignored:
    """Outcomes of the far side: the near side measures."""

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        pass

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        print(f"transfer {transfer_id} failed: {reason}: {detail}", flush=True)


def names_of(sequence: int) -> tuple[TransferId, RequestId]:
    return TransferId(f"bench-{sequence}/0"), RequestId(f"bench-{sequence}")


async def run_far_side(port: int, max_tokens: int, raw_bytes: int, config: KvTransferConfig) -> None:
    """Be the decode side until told to stop."""
    torch.set_num_threads(1)
    pool = PagedPool(max_tokens, seed=2)
    pair = RawPair("far", port, raw_bytes)
    identity = WorkerIdentity(WorkerId("far"), Epoch(1), "benchmark")
    receiver = KvReceiver(config, identity, LAYOUT, pool, _Ignored(), MonotonicClock())
    server = create_server()
    add_kv_transfer(receiver, server)
    address = f"127.0.0.1:{bind(server, '127.0.0.1', 0)}"
    await server.start()
    pair.store.set("address", address)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def obey() -> None:
        ways: dict[str, FarWay] = {}
        try:
            far_ways = FarWays(config)
            pair.store.set("ways", json.dumps(far_ways.addresses))
            ways = far_ways.open()
            while (command := pair.next_command())[0] != _STOP:
                if command[0] == _RAW:
                    pair.receive_raw()
                    continue
                if command[0] == _WAY:
                    pair.receive_over(ways[_WAYS[command[1]]])
                    continue
                transfer_id, request_id = names_of(command[1] >> 32)
                expected = receiver.expect(transfer_id, request_id, 0, command[1] & 0xFFFFFFFF)
                asyncio.run_coroutine_threadsafe(expected, loop).result(WAIT_S)
                pair.say_done()
            pair.store.set("checksum", pool.checksum())
        finally:
            for way in ways.values():
                way.close()
            loop.call_soon_threadsafe(stopped.set)

    thread = threading.Thread(target=obey, name="commands")
    thread.start()
    await stopped.wait()
    thread.join(WAIT_S)
    await receiver.close()
    await server.stop(1.0)
