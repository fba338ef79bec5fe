"""Resumable streams at real gateways over real Redis: whatever breaks, a client gets every event once, or is told why
not."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import grpc

from core.rpc import connect
from protos import inference_pb2 as pb
from router.resume.codec import mirror_key
from router.resume.events import StreamKey
from tandem_client import Client
from tests.fakes.cluster import text_request
from tests.fakes.gateways import CLUSTER, Gateways, GatewaySeat, several_gateways
from tests.fakes.resuming import ResumingReader, same_words
from tests.fakes.script import PATIENCE_S
from tests.fakes.tcp_proxy import TcpProxy, tcp_proxy

WINDOW_S = 20.0
TOKENS = 40
UNKNOWN = "there is no such stream, or its window has passed"


def request(
    request_id: str, max_tokens: int = TOKENS, *, window_s: float = WINDOW_S, **more: Any
) -> pb.GenerateRequest:
    return text_request("hello", max_tokens=max_tokens, request_id=request_id, resume_window_s=window_s, **more)


@asynccontextmanager
async def cluster_of(
    folder: Path, checkpoint: Path, count: int, **config: Any
) -> AsyncIterator[tuple[Gateways, list[GatewaySeat]]]:
    """Gateways that know each other."""
    async with several_gateways(folder, checkpoint, count, num_prefills=1, num_decodes=1, **config) as cluster:
        await cluster.until(lambda: all(len(seat.gateway.replicas.peers) == count - 1 for seat in cluster.seats))
        yield cluster, cluster.seats


def stop_decoding(cluster: Gateways, num_steps: int = 0) -> None:
    """Only so many tokens after the first, until `decode` is called."""
    cluster.decodes[0].steps_allowed = asyncio.Semaphore(num_steps)


def decode(cluster: Gateways, num_steps: int = 10_000) -> None:
    for _ in range(num_steps):
        cluster.decodes[0].steps_allowed.release()


async def idle(seat: GatewaySeat) -> None:
    assert await seat.gateway.dispatcher.wait_idle(PATIENCE_S)


async def mirrored(cluster: Gateways, request_id: str, tenant: str = "") -> None:
    """Wait until the store knows of a stream."""
    name = mirror_key(CLUSTER, StreamKey(tenant, request_id))
    assert await cluster.store.read({name: "0"}, max_entries=1, wait_s=PATIENCE_S)


async def test_it_is_read_on_at_its_own_and_at_another_gateway(tmp_path: Path, checkpoint: Path) -> None:
    async with cluster_of(tmp_path, checkpoint, 2) as (cluster, (first, second)):
        whole = ResumingReader("whole")
        await whole.begin(first.channel, request("whole"))
        assert whole.numbers == list(range(len(whole.events)))
        stop_decoding(cluster, 3)
        broken = ResumingReader("broken")
        await broken.begin(first.channel, request("broken"), 2)
        assert first.gateway.dispatcher.num_active == 1
        decode(cluster)
        await broken.resume(first.channel, 3)
        await broken.resume(second.channel, 4)
        await broken.resume(second.channel)
        assert broken.numbers == list(range(len(broken.events)))
        assert same_words(broken.events) == same_words(whole.events)
        for seat in (first, second):  # again, after its end, from its beginning
            again = ResumingReader("broken")
            await again.resume(seat.channel)
            assert again.events == broken.events
            await again.resume(seat.channel)
            assert again.events == broken.events, "nothing follows the end"
        beyond = ResumingReader("broken")
        beyond.events = [pb.GenerateResponse(event_index=10_000)]
        for seat in (first, second):
            assert (await beyond.fails(seat.channel))[0] is grpc.StatusCode.INVALID_ARGUMENT
        several = ResumingReader("several")
        await several.begin(first.channel, request("several", n=3), 4)
        await several.resume(second.channel)
        assert several.numbers == list(range(len(several.events)))
        assert sorted(one.finished.choice for one in several.events if one.HasField("finished")) == [0, 1, 2]


async def test_connections_break_at_any_moment(tmp_path: Path, checkpoint: Path) -> None:
    async with AsyncExitStack() as stack:
        cluster, seats = await stack.enter_async_context(cluster_of(tmp_path, checkpoint, 3))
        proxies = [await stack.enter_async_context(tcp_proxy(seat.address)) for seat in seats]
        channels = [await stack.enter_async_context(connect(proxy.address)) for proxy in proxies]
        whole = ResumingReader("whole")
        await whole.begin(channels[0], request("whole"))
        num_drops = 0
        for seed in range(12):
            num_drops += await _read_with_drops(random.Random(seed), f"r{seed}", cluster, proxies, channels, whole)
        assert num_drops >= 24
        for seat in seats:
            await idle(seat)


async def _read_with_drops(
    rng: random.Random,
    request_id: str,
    cluster: Gateways,
    proxies: list[TcpProxy],
    channels: list[grpc.aio.Channel],
    whole: ResumingReader,
) -> int:
    """Read a stream over connections that are reset after random events, each time at a random gateway. Returns how
    often."""
    stop_decoding(cluster, 1)
    reader, num_drops, at, events_left = ResumingReader(request_id), 0, 0, 0

    def on_event() -> None:
        nonlocal num_drops, events_left
        decode(cluster, rng.randint(1, 4))
        events_left -= 1
        if events_left == 0:
            proxies[at].drop()
            num_drops += 1

    reader.on_event = on_event
    while not reader.is_over:
        at, events_left = rng.randrange(len(proxies)), rng.randint(1, 12)
        reading = reader.resume(channels[at]) if reader.events else reader.begin(channels[at], request(request_id))
        [outcome] = await asyncio.gather(reading, return_exceptions=True)
        if outcome is not None:
            assert isinstance(outcome, grpc.aio.AioRpcError)
            assert outcome.code() is grpc.StatusCode.UNAVAILABLE, outcome
    assert reader.numbers == list(range(len(reader.events)))
    assert same_words(reader.events) == same_words(whole.events)
    return num_drops


async def test_the_client_reads_on_by_itself(tmp_path: Path, checkpoint: Path) -> None:
    async with AsyncExitStack() as stack:
        cluster, seats = await stack.enter_async_context(cluster_of(tmp_path, checkpoint, 2))
        proxies = [await stack.enter_async_context(tcp_proxy(seat.address)) for seat in seats]
        client = await stack.enter_async_context(Client(",".join(proxy.address for proxy in proxies)))
        stop_decoding(cluster, 1)
        text, indices = "", []
        pieces = client.generate("hello", max_tokens=TOKENS, temperature=0.0, resume_window_s=WINDOW_S)
        async with asyncio.timeout(PATIENCE_S):
            async for number, piece in _numbered(pieces):
                text += piece.text
                indices += [token.index for token in piece.tokens]
                decode(cluster, 2)
                if number % 5 == 2:
                    for proxy in proxies:
                        proxy.drop()
        assert indices == list(range(TOKENS))
        assert text == "".join(chr(ord("a") + n % 26) for n in range(TOKENS))
        assert sum(proxy.num_connections for proxy in proxies) > 3


async def _numbered(pieces: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    number = 0
    async for piece in pieces:
        yield number, piece
        number += 1


async def test_nobody_reads_it_on_and_workers_are_freed(tmp_path: Path, checkpoint: Path) -> None:
    async with cluster_of(tmp_path, checkpoint, 2) as (cluster, (first, second)):
        worker = cluster.decodes[0]
        stop_decoding(cluster, 1)
        reader = ResumingReader("lapses")
        await reader.begin(first.channel, request("lapses", window_s=0.3), 2)
        await worker.wait_until(lambda: bool(worker.aborts))
        assert "nobody read it for 0.3 s" in worker.aborts[0][1]
        await idle(first)
        assert not worker.held
        assert first.gateway.resumables.num_streams == first.gateway.resumables.num_bytes == 0
        for seat in (first, second):
            assert await reader.fails(seat.channel) == (grpc.StatusCode.NOT_FOUND, UNKNOWN)
        assert await cluster.store.scan(f"tandem:{CLUSTER}:resume:") == {}


async def test_a_reader_at_another_gateway_keeps_it_going(tmp_path: Path, checkpoint: Path) -> None:
    async with cluster_of(tmp_path, checkpoint, 2) as (cluster, (first, second)):
        stop_decoding(cluster, 1)
        reader = ResumingReader("kept")
        await reader.begin(first.channel, request("kept", window_s=0.4), 2)
        windows, get = asyncio.Semaphore(0), first.store.get

        async def get_and_tell(key: str) -> bytes | None:
            found = await get(key)
            windows.release()
            return found

        with mock.patch.object(first.store, "get", get_and_tell):
            reading = asyncio.create_task(reader.resume(second.channel))
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(3):  # each time the window is over
                    await windows.acquire()
        assert first.gateway.dispatcher.num_active == 1
        decode(cluster)
        await reading
        assert reader.is_over
        assert reader.numbers == list(range(len(reader.events)))


async def test_abort_and_tenants(tmp_path: Path, checkpoint: Path) -> None:
    async with cluster_of(tmp_path, checkpoint, 2) as (cluster, (first, second)):
        stop_decoding(cluster, 1)
        mine = ResumingReader("mine", "acme")
        await mine.begin(first.channel, request("mine", tenant="acme"), 2)
        await mirrored(cluster, "mine", "acme")
        stranger, nobody = ResumingReader("mine", "other"), ResumingReader("never", "acme")
        for seat in (first, second):
            assert await stranger.fails(seat.channel) == (grpc.StatusCode.NOT_FOUND, UNKNOWN)
            assert await nobody.fails(seat.channel) == (grpc.StatusCode.NOT_FOUND, UNKNOWN), "no telling them apart"
            assert not (await seat.inference.Abort(pb.AbortRequest(request_id="mine", tenant="other"))).found
        reading = asyncio.create_task(mine.fails(second.channel))
        assert (await second.inference.Abort(pb.AbortRequest(request_id="mine", tenant="acme"))).found
        code, why = await reading
        assert code is grpc.StatusCode.CANCELLED
        assert "aborted by an Abort call at another gateway" in why
        await idle(first)
        for seat in (first, second):
            assert not (await seat.inference.Abort(pb.AbortRequest(request_id="mine", tenant="acme"))).found
            assert (await mine.fails(seat.channel))[0] is grpc.StatusCode.CANCELLED, "it is told until the window ends"
        decode(cluster, 1)
        plain = second.generate(text_request(request_id="plain", max_tokens=TOKENS))  # of no resumable kind
        await plain.read_tokens(2)
        assert (await first.inference.Abort(pb.AbortRequest(request_id="plain"))).found
        await plain.fails(grpc.StatusCode.CANCELLED)


async def test_redis_dies_and_comes_back(tmp_path: Path, checkpoint: Path) -> None:
    resume = {"store_patience_s": 0.5, "retry_interval_s": 0.05}
    async with cluster_of(tmp_path, checkpoint, 2, resume=resume) as (cluster, (first, second)):
        stop_decoding(cluster, 4)
        reader, elsewhere = ResumingReader("r"), ResumingReader("r")
        await reader.begin(first.channel, request("r"), 2)
        is_read = asyncio.Event()
        elsewhere.on_event = is_read.set
        reading = asyncio.create_task(elsewhere.fails(second.channel))
        async with asyncio.timeout(PATIENCE_S):
            await is_read.wait()
        cluster.redis.kill()
        code, why = await reading
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "its own gateway may have it" in why
        assert (await elsewhere.fails(second.channel))[0] is grpc.StatusCode.UNAVAILABLE, "nobody can tell"
        decode(cluster, 5)
        await reader.resume(first.channel, 3)
        assert reader.numbers == list(range(5)), "its own gateway goes on"
        cluster.redis.start()  # and knows nothing any more
        await mirrored(cluster, "r")
        decode(cluster)
        await elsewhere.resume(second.channel)
        await reader.resume(first.channel)
        assert reader.numbers == list(range(len(reader.events)))
        assert elsewhere.events == reader.events


async def test_a_gateway_that_stops_leaves_what_there_was(tmp_path: Path, checkpoint: Path) -> None:
    async with cluster_of(tmp_path, checkpoint, 2) as (cluster, (first, second)):
        stop_decoding(cluster, 2)
        reader, done = ResumingReader("cut"), ResumingReader("done")
        await done.begin(first.channel, request("done", max_tokens=1), 1)
        await reader.begin(first.channel, request("cut"), 2)
        await first.gateway.stop(0.0)
        await done.resume(second.channel)
        assert done.is_over
        code, why = await reader.fails(second.channel)
        assert (code, why) == (grpc.StatusCode.CANCELLED, "the gateway is stopping")
        assert reader.numbers == list(range(len(reader.events)))


async def test_bounds(tmp_path: Path, checkpoint: Path) -> None:
    resume = {"max_stream_bytes": 1024, "max_streams": 2, "max_window_s": 60.0}
    async with cluster_of(tmp_path, checkpoint, 1, resume=resume) as (cluster, (only,)):
        for window_s in (61.0, -1.0, float("nan"), float("inf")):
            refused = only.generate(request("too long", window_s=window_s))
            error = await refused.fails(grpc.StatusCode.INVALID_ARGUMENT)
            assert "resume_window_s: must be in [0, 60]" in (error.details() or "")
        read = ResumingReader("read")
        await read.begin(only.channel, request("read", 200))
        assert read.numbers == list(range(len(read.events))), "whoever reads along gets more than is kept"
        late = ResumingReader("read")
        assert (await late.fails(only.channel))[0] is grpc.StatusCode.OUT_OF_RANGE
        stop_decoding(cluster, 1)
        unread = ResumingReader("unread")
        await unread.begin(only.channel, request("unread", 200), 2)
        decode(cluster)
        await idle(only)
        code, why = await unread.fails(only.channel)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "more than 1024 bytes of the resumable stream are unread" in why
        assert unread.numbers == list(range(len(unread.events))), "all that was kept is delivered"
        stop_decoding(cluster, 1)
        running = [ResumingReader(f"running {n}".replace(" ", "-")) for n in range(2)]
        for one in running:  # they take the places of the two that are over and were read
            await one.begin(only.channel, request(one.request_id), 2)
        await only.generate(request("one-more")).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
        decode(cluster)
        for one in running:
            await one.resume(only.channel)
            assert one.is_over
