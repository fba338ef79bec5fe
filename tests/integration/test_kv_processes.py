"""Two real processes: gRPC control stream, gloo link, and the death of either side in the middle of a transfer."""

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from core.clock import MonotonicClock
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.membership import WorkerIdentity
from core.rpc import bind, create_server
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import Peer
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.rpc import add_kv_transfer
from kv_transfer.sender.sender import KvSender
from tests.integration.kv_far_peer import CONFIG
from tests.kv_peers import LAYOUT, PATIENCE_S, ArrayPool, Outcomes

LAYERS = range(LAYOUT.num_layers)
ROOT = Path(__file__).parent.parent.parent


class FarPeer:
    """The other process, spoken to in JSON lines."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def hear(self, key: str) -> dict[str, Any]:
        """Wait for the next line, which must have `key`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(2 * PATIENCE_S):
            line = json.loads(await self.process.stdout.readline())
        assert key in line, line
        return dict(line)

    def say(self, **values: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(values).encode() + b"\n")

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@contextlib.asynccontextmanager
async def _far_peer(*args: str) -> AsyncIterator[FarPeer]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.kv_far_peer", *args, cwd=ROOT, stdin=PIPE, stdout=PIPE, env=env
    )
    try:
        yield FarPeer(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Near:
    """This process as the prefill side."""

    def __init__(self, address: str) -> None:
        self.pool = ArrayPool()
        self.outcomes = Outcomes(self.pool)
        identity = WorkerIdentity(WorkerId("near"), Epoch(1), "test")
        self.sender = KvSender(
            CONFIG,
            identity,
            LAYOUT,
            self.pool,
            self.outcomes,
            MonotonicClock(),
            metrics=KvTransferMetrics(CollectorRegistry()),
        )
        self.peer = Peer(WorkerId("far"), Epoch(2), address)

    async def offer(self, name: str, num_tokens: int) -> TransferId:
        self.pool.fill(RequestId(name), num_tokens)
        await self.sender.offer(TransferId(name), RequestId(name), num_tokens, self.peer)
        return TransferId(name)


async def test_kv_crosses_between_processes_over_grpc_and_gloo() -> None:
    async with _far_peer("receiver") as far:
        near = Near((await far.hear("address"))["address"])
        for name, num_tokens, held_tokens in (("a", 1500, 0), ("b", 700, 0), ("c", 333, 128)):
            far.say(name=name, num_tokens=num_tokens, held_tokens=held_tokens)
            await far.hear("expected")
            transfer_id = await near.offer(name, num_tokens)
            for start in range(0, num_tokens, 256):
                near.sender.push(transfer_id, LAYERS, range(start, min(start + 256, num_tokens)))
            near.sender.commit(transfer_id, 5)
            assert await near.outcomes.outcome(transfer_id) == "acked"
            landed = await far.hear("outcome")
            assert (landed["outcome"], landed["first_token_id"]) == ("landed", 5)
            sent = near.pool.arrays[RequestId(name)].clone()
            sent[:, :, :, :held_tokens] = float("nan")
            assert landed["digest"] == hashlib.sha256(sent.numpy().tobytes()).hexdigest()
        await near.sender.close()
        far.end_input()
        await far.hear("closed")
        assert await asyncio.wait_for(far.process.wait(), PATIENCE_S) == 0


async def test_the_death_of_the_receiver_mid_frame_fails_the_sender_at_once() -> None:
    async with _far_peer("receiver") as far:
        near = Near((await far.hear("address"))["address"])
        far.say(name="a", num_tokens=20_000, held_tokens=0, is_stuck=True)
        await far.hear("expected")
        transfer_id = await near.offer("a", 20_000)
        near.sender.push(transfer_id, LAYERS, range(20_000))
        assert await asyncio.to_thread(near.pool.is_entered.wait, PATIENCE_S)
        far.process.kill()
        assert await near.outcomes.outcome(transfer_id) in ("peer_lost", "link_lost")
        dead = await near.offer("b", 10)
        assert await near.outcomes.outcome(dead) == "peer_lost"
        await near.sender.close()


async def test_the_death_of_the_sender_mid_transfer_frees_the_receiver() -> None:
    pool = ArrayPool()
    outcomes = Outcomes(pool)
    receiver = KvReceiver(
        CONFIG,
        WorkerIdentity(WorkerId("near"), Epoch(1), "test"),
        LAYOUT,
        pool,
        outcomes,
        MonotonicClock(),
        metrics=KvTransferMetrics(CollectorRegistry()),
    )
    server = create_server()
    add_kv_transfer(receiver, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    transfer_id, request_id = TransferId("endless"), RequestId("endless")
    pool.clear(request_id, 1000)
    await receiver.expect(transfer_id, request_id, 0, 1_000_000)
    async with _far_peer("sender", f"127.0.0.1:{port}") as far:
        await far.hear("pushed")
        assert await asyncio.to_thread(pool.is_entered.wait, PATIENCE_S)
        far.process.kill()
        assert await outcomes.outcome(transfer_id) in ("peer_lost", "link_lost")
    num_writes = len(pool.writes)
    await receiver.close()
    await server.stop(1.0)
    assert len(pool.writes) == num_writes
    assert not any(thread.name.startswith("kv-receive") for thread in threading.enumerate())


async def test_an_absent_decode_worker_is_a_prompt_failure() -> None:
    near = Near("127.0.0.1:1")
    transfer_id = await near.offer("a", 10)
    assert await near.outcomes.outcome(transfer_id) == "peer_lost"
    await near.sender.close()


async def test_a_stream_that_does_not_begin_with_a_hello_ends_with_a_status() -> None:
    from core.rpc import connect
    from protos import kv_transfer_pb2 as pb
    from protos import kv_transfer_pb2_grpc as pb_grpc

    async with _far_peer("receiver") as far:
        address = (await far.hear("address"))["address"]
        channel = connect(address)
        stub = pb_grpc.KvTransferStub(channel)
        hello = pb.SenderHello(worker_id="x", epoch=1, receiver_epoch=9, frame_version=1)
        for first, code in (
            (pb.SenderMessage(offer=pb.Offer()), grpc.StatusCode.INTERNAL),
            (pb.SenderMessage(hello=hello), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            call = stub.Control(iter([first]))
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call.read()
            assert failed.value.code() is code
        await channel.close()
