"""A stream's way from its own gateway through the store to readers at another one, both sides in one process."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from core.clock import MonotonicClock
from core.errors import Aborted, InvalidRequest, ProtocolError, RejectedError, RequestNotFound, ServingError, WorkerLost
from core.ids import GatewayId
from core.store import StreamEntry
from core.store_memory import MemoryStore
from router.resume.codec import Batch, StreamOrigin, batch_from_bytes, batch_to_bytes, mirror_key
from router.resume.config import ResumeConfig
from router.resume.events import EventsGone, GatewayGone, RelayedError, StreamKey, StreamKind
from router.resume.metrics import ResumeMetrics
from router.resume.port import Follower
from router.resume.service import Resumables

PATIENCE_S = 5.0
KEY = StreamKey("acme", "r")
CONFIG = ResumeConfig(mirror_interval_s=0.002, retry_interval_s=0.01, store_patience_s=0.3)
ORIGIN = StreamOrigin(GatewayId("gw-a"), "nonce", StreamKind.CHAT, 12.5)


class Call:
    """A call whose events a test gives."""

    def __init__(self) -> None:
        self._news: asyncio.Queue[list[bytes] | ServingError | None] = asyncio.Queue()
        self.is_left = asyncio.Event()

    def tell(self, *events: str) -> None:
        self._news.put_nowait([event.encode() for event in events])

    def end(self, error: ServingError | None = None) -> None:
        self._news.put_nowait(error)

    async def batches(self) -> AsyncGenerator[Sequence[bytes], None]:
        try:
            while (news := await self._news.get()) is not None:
                if isinstance(news, ServingError):
                    raise news
                yield news
        finally:
            self.is_left.set()


class Side:
    """One gateway's resumable streams."""

    def __init__(self, name: str, store: MemoryStore, alive: set[str], config: ResumeConfig = CONFIG) -> None:
        self._num_nonces = 0
        self.registry = CollectorRegistry()
        self.resumables = Resumables(
            store,
            "test",
            GatewayId(name),
            MonotonicClock(),
            config,
            ResumeMetrics(self.registry),
            new_nonce=self._nonce,
            is_alive=alive.__contains__,
            patience_s=0.2,
        )

    def open(self, call: Call, key: StreamKey = KEY, window_s: float = 30.0) -> Follower:
        return self.resumables.open(key, StreamKind.GENERATE, window_s, call.batches(), call.end)

    async def follow(self, after: int | None = None, key: StreamKey = KEY) -> Follower:
        kind, follower = await self.resumables.follow(key, after)
        assert kind is StreamKind.GENERATE
        return follower

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def _nonce(self) -> str:
        self._num_nonces += 1
        return str(self._num_nonces)


class Pair:
    """An owner, and a gateway that others come to."""

    def __init__(self, config: ResumeConfig) -> None:
        self.store = MemoryStore()
        self.alive = {"gw-a", "gw-b"}
        self.a = Side("gw-a", self.store, self.alive, config)
        self.b = Side("gw-b", self.store, self.alive, config)


@asynccontextmanager
async def pair(config: ResumeConfig = CONFIG) -> AsyncIterator[Pair]:
    both = Pair(config)
    tasks = [asyncio.create_task(side.resumables.run()) for side in (both.a, both.b)]
    try:
        async with asyncio.timeout(4 * PATIENCE_S):
            yield both
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for side in (both.a, both.b):
            await side.resumables.close()


async def read(follower: Follower, count: int | None = None) -> str:
    """Read so many events, or all."""
    found: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while count is None or len(found) < count:
            events = await follower.take()
            if not events:
                break
            found += [event.data.decode() for event in events]
    return " ".join(found)


@pytest.mark.parametrize(
    "batch",
    [
        Batch(ORIGIN, 0),
        Batch(ORIGIN, 7, (b"", b"\xff\x00"), is_over=True),
        Batch(ORIGIN, 2**40, (b"x",), is_cut=True, is_first=True),
    ],
)
def test_a_batch_survives_the_store(batch: Batch) -> None:
    assert batch_from_bytes(batch_to_bytes(batch)) == batch


def test_an_error_is_told_elsewhere_as_what_it_was() -> None:
    batch = batch_from_bytes(batch_to_bytes(Batch(ORIGIN, 1, is_over=True, error=WorkerLost("d0 died"))))
    error = batch.error
    assert isinstance(error, RelayedError)
    assert (str(error), error.grpc_code, error.http_status, error.retryable) == ("d0 died", "UNAVAILABLE", 503, True)
    assert error.reason == "WorkerLost"


@pytest.mark.parametrize("data", [b"", b"\xff\xff", batch_to_bytes(Batch(ORIGIN, 0)).replace(b"chat", b"chit")])
def test_what_is_no_batch_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        batch_from_bytes(data)


def test_tenants_have_names_of_their_own() -> None:
    names = {mirror_key("c", StreamKey(*key)) for key in (("", "a"), ("a", ""), ("a", "a"), ("a:a", "a"), ("a", "a:a"))}
    assert len(names) == 5


async def test_any_number_of_readers_at_both_gateways() -> None:
    async with pair() as both:
        call = Call()
        own = both.a.open(call)
        call.tell("a", "b")
        assert await read(own, 2) == "a b"
        others = [await both.b.follow(), await both.b.follow(0), await both.a.follow(1), await both.b.follow(2)]
        call.tell("c")
        call.tell("d", "e")
        call.end()
        assert [await read(one) for one in (own, *others)] == ["c d e", "a b c d e", "b c d e", "c d e", "d e"]
        for one in (own, *others):
            one.close()
            one.close()
        assert both.b.resumables.num_bytes == 0, "a copy nobody reads is not kept"
        assert await read(await both.b.follow(3)) == "e"
        assert both.b.count("tandem_gateway_resumed_total", where="elsewhere") == 4
        assert both.a.count("tandem_gateway_resumed_total", where="here") == 1


async def test_how_it_failed_is_told_everywhere_after_all_events() -> None:
    async with pair() as both:
        call = Call()
        own = both.a.open(call)
        call.tell("a")
        assert await read(own, 1) == "a"
        call.end(WorkerLost("d0 died"))
        for follower in (own, await both.a.follow(0), await both.b.follow(0)):
            with pytest.raises(ServingError, match="d0 died") as failed:
                await read(follower)
            assert failed.value.grpc_code == "UNAVAILABLE"


async def test_before_the_first_event_a_failure_is_all_there_is() -> None:
    async with pair() as both:
        call = Call()
        own = both.a.open(call)
        refused = RejectedError(retry_after_s=1.5, reason="queue_full", detail="x")  # type: ignore[arg-type]
        call.end(refused)
        with pytest.raises(RejectedError) as met:
            await read(own)
        assert met.value is refused, "with its retry hint"


async def test_a_store_that_forgot_is_told_all_again() -> None:
    async with pair() as both:
        call = Call()
        own = both.a.open(call)
        call.tell("a", "b")
        assert await read(own, 2) == "a b"
        reader = await both.b.follow()
        assert await read(reader, 2) == "a b"
        await both.store.delete(mirror_key("test", KEY))
        call.tell("c")
        assert await read(reader, 1) == "c"
        later = await both.b.follow()
        assert await read(later, 3) == "a b c"
        call.end()
        assert (await read(reader), await read(later)) == ("", "")


async def test_the_store_is_away_for_a_while() -> None:
    async with pair() as both:
        call = Call()
        own = both.a.open(call)
        call.tell("a")
        assert await read(own, 1) == "a"
        reader = await both.b.follow()
        assert await read(reader, 1) == "a"
        both.store.set_available(False)
        call.tell("b")
        assert await read(own, 1) == "b"
        with pytest.raises(ServingError, match="store") as unknown:
            await both.b.follow(key=StreamKey("", "other"))
        assert unknown.value.grpc_code == "UNAVAILABLE"
        both.store.set_available(True)
        call.tell("c")
        assert await read(reader, 2) == "b c"
        both.store.set_available(False)
        with pytest.raises(ServingError, match="is away"):
            await read(reader)
        another = Call()
        alone = both.a.open(another, StreamKey("", "alone"))
        another.tell("x")
        another.end()
        assert await read(alone) == "x"
        both.store.set_available(True)
        assert await read(await both.b.follow(1), 1) == "c"
        call.end()
        assert both.a.count("tandem_gateway_resume_mirror_failures_total") > 0


async def test_a_dead_gateways_stream_is_delivered_as_far_as_it_was_saved() -> None:
    async with pair() as both:
        call = Call()
        own = both.a.open(call)
        call.tell("a", "b")
        assert await read(own, 2) == "a b"
        early = await both.b.follow(0)
        both.alive.discard("gw-a")
        for follower, rest in ((early, "b"), (await both.b.follow(), "a b"), (await both.b.follow(5), "")):
            assert await read(follower, len(rest.split())) == rest
            with pytest.raises(GatewayGone, match="gateway gw-a, which served the request, is gone; events up to 1"):
                await read(follower)
            follower.close()
        call.end()
        await own.take()
        assert await read(await both.b.follow(0)) == "b", "it had only been silent"


async def test_a_new_request_takes_the_name_of_one_that_is_over() -> None:
    async with pair() as both:
        first, second = Call(), Call()
        own = both.a.open(first)
        first.tell("old")
        first.end()
        assert await read(own) == "old"
        reader, slow = await both.b.follow(), await both.b.follow()
        assert await read(reader) == "old"
        again = both.a.open(second)
        second.tell("new", "er")
        assert await read(again, 2) == "new er"
        second.end()
        assert await read(await both.b.follow()) == "new er"
        assert await read(slow) == "old", "it had all of it"
        own.close()
        assert both.a.resumables.num_streams == 1


async def test_a_stream_larger_than_the_mirror_may_be_is_its_own_gateways() -> None:
    async with pair(CONFIG.model_copy(update={"max_stream_bytes": 1024})) as both:
        call = Call()
        own = both.a.open(call)
        reader = asyncio.create_task(_read_until_it_fails(both))
        for number in range(64):
            call.tell(f"{number:031}")
            await read(own, 1)
        call.end()
        assert await read(own) == ""
        error = await reader
        assert isinstance(error, EventsGone)
        with pytest.raises(EventsGone):
            await both.a.follow(0)
        assert await read(await both.a.follow(60)) == f"{61:031} {62:031} {63:031}"
        assert both.a.resumables.num_bytes <= 1024


async def test_the_store_is_not_filled_up() -> None:
    async with pair(CONFIG.model_copy(update={"max_mirror_bytes": 1024})) as both:
        calls = [Call() for _ in range(3)]
        keys = [StreamKey("", str(number)) for number in range(3)]
        own = [both.a.open(call, key) for call, key in zip(calls, keys, strict=True)]
        for call, follower in zip(calls, own, strict=True):
            call.tell("x" * 400)
            assert await read(follower, 1)
        assert await read(await both.b.follow(key=keys[0]), 1)
        assert await read(await both.b.follow(key=keys[1]), 1)
        for follower in (await both.b.follow(key=keys[2]), await both.b.follow(0, key=keys[2])):
            with pytest.raises(EventsGone, match="gateway gw-a has the rest"):
                await read(follower)
        assert await read(await both.a.follow(key=keys[2]), 1), "its own gateway has it"
        calls[0].end()
        assert await read(own[0]) == ""
        again = Call()
        new = both.a.open(again, keys[0])  # the old one's room is free
        again.tell("y" * 300)
        assert await read(new, 1)
        assert await read(await both.b.follow(key=keys[0]), 1) == "y" * 300
        for call in (*calls[1:], again):
            call.end()


async def test_many_who_come_at_once_do_not_read_the_store_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(CONFIG.model_copy(update={"max_total_bytes": 1024})) as both:
        reads, most = [0], [0]
        read_store = both.store.read

        async def counted(
            streams: Mapping[str, str], *, max_entries: int, wait_s: float
        ) -> Mapping[str, list[StreamEntry]]:
            if wait_s:  # of the copies that are there
                return await read_store(streams, max_entries=max_entries, wait_s=wait_s)
            reads[0] += 1
            most[0] = max(most[0], reads[0])
            await asyncio.sleep(0)
            try:
                return await read_store(streams, max_entries=max_entries, wait_s=wait_s)
            finally:
                reads[0] -= 1

        keys, own = [StreamKey("acme", f"r{one}") for one in range(24)], []
        for key in keys:
            call = Call()
            own.append(both.a.open(call, key))
            call.tell("x" * 500)
            await read(own[-1], 1)
        monkeypatch.setattr(both.store, "read", counted)
        found = await asyncio.gather(*(both.b.follow(key=key) for key in keys), return_exceptions=True)
        assert most[0] <= 4
        refused = [one for one in found if isinstance(one, RejectedError)]
        assert len(refused) >= len(keys) - 8, "of 500 bytes each, while 1024 are kept"
        for one in (*found, *own):
            if not isinstance(one, BaseException):
                one.close()


async def test_two_gateways_with_one_name_at_a_time() -> None:
    async with pair() as both:
        first, second = Call(), Call()
        own = both.a.open(first)
        first.tell("a0")
        assert await read(own, 1) == "a0"
        other = both.b.open(second)
        second.tell("b0")
        assert await read(other, 1) == "b0"
        third = Side("gw-c", both.store, both.alive)
        running = asyncio.create_task(third.resumables.run())
        reader = await third.follow()
        first.tell("a1")
        second.tell("b1")
        assert await read(own, 1) == "a1"
        assert await read(reader, 2) == "b0 b1", "the newer one"
        first.end()
        second.end()
        assert [await read(one) for one in (own, other, reader)] == ["", "b1", ""]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await third.resumables.close()


async def _read_until_it_fails(both: Pair) -> ServingError | None:
    await asyncio.sleep(0)
    while True:
        try:
            follower = await both.b.follow()
            break
        except RequestNotFound:
            await asyncio.sleep(0)
    try:
        await read(follower)
    except ServingError as error:
        return error
    return None


async def test_room_is_made_by_what_was_read_and_only_by_that() -> None:
    config = CONFIG.model_copy(update={"max_total_bytes": 1024, "max_stream_bytes": 2048, "max_streams": 3})
    async with pair(config) as both:
        calls = {name: Call() for name in ("read", "unread", "growing")}
        followers = {name: both.a.open(call, StreamKey("", name)) for name, call in calls.items()}
        with pytest.raises(RejectedError, match="3 resumable streams are kept"):
            both.a.resumables.window(1.0)
        for name in ("read", "unread"):
            calls[name].tell("x" * 400)
            calls[name].end()
        await read(followers["read"])
        await followers["unread"].take()  # but not its end
        for name in ("read", "unread"):
            followers[name].close()
        calls["growing"].tell("y" * 400)
        assert await read(followers["growing"], 1)
        assert both.a.count("tandem_gateway_resumable_forgotten_total", cause="made room") == 1
        with pytest.raises(RequestNotFound):
            await both.a.follow(key=StreamKey("", "read"))
        assert await read(await both.a.follow(key=StreamKey("", "unread"))) == "x" * 400
        calls["growing"].tell("z" * 300)
        assert await read(followers["growing"], 1) == "z" * 300
        with pytest.raises(EventsGone):
            await both.a.follow(key=StreamKey("", "growing"))
        followers["growing"].close()
        calls["growing"].tell("w" * 900)
        rest = await both.a.follow(1, key=StreamKey("", "growing"))
        assert await read(rest, 1) == "w" * 900
        with pytest.raises(ServingError, match="no room for what is unread"):
            await read(rest)
        assert both.a.resumables.num_bytes <= 1024 + 900


@pytest.mark.parametrize("asked_s", [-1.0, 301.0, float("nan"), float("inf"), float("-inf")])
async def test_windows_out_of_range(asked_s: float) -> None:
    async with pair() as both:
        with pytest.raises(InvalidRequest, match="resume_window_s: must be in"):
            both.a.resumables.window(asked_s)
        assert [both.a.resumables.window(ok) for ok in (None, 0.0, 1.0, 300.0)] == [0.0, 0.0, 1.0, 300.0]


async def test_where_nothing_is_resumable() -> None:
    async with pair(CONFIG.model_copy(update={"max_window_s": 0.0})) as both:
        assert both.a.resumables.window(0.0) == 0.0
        with pytest.raises(InvalidRequest, match="no stream is resumable here"):
            both.a.resumables.window(1.0)


async def test_the_window_of_a_stream_nobody_reads() -> None:
    async with pair() as both:
        call = Call()
        own = both.a.open(call, window_s=0.1)
        call.tell("a")
        assert await read(own, 1) == "a"
        own.close()
        await call.is_left.wait()  # aborted, which ends what reads the answer
        assert both.a.resumables.num_streams == 0
        for side in (both.a, both.b):
            with pytest.raises(RequestNotFound):
                await side.follow()
        assert both.a.count("tandem_gateway_resumable_unread_total") == 1
        assert both.a.count("tandem_gateway_resumable_bytes") == 0


async def test_closing_saves_how_it_ended() -> None:
    async with pair() as both:
        call = Call()
        own = both.a.open(call)
        call.tell("a")
        assert await read(own, 1) == "a"
        call.end(Aborted("the gateway is stopping"))
        await both.a.resumables.close()
        both.alive.discard("gw-a")
        reader = await both.b.follow()
        assert await read(reader, 1) == "a"
        with pytest.raises(ServingError, match="the gateway is stopping"):
            await read(reader)
