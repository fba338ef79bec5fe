"""Control streams that end badly, come too early, too late or from the past: somebody is always told."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from core.errors import DeadlineExceeded, RejectedError, RejectReason
from core.ids import TransferId
from core.rpc import bind, connect, create_server
from kv_transfer.config import KvTransferConfig
from kv_transfer.control import ControlReply, nack
from kv_transfer.rpc import KvTransferService
from kv_transfer.sender.link import SendLink
from kv_transfer.sender.pump import SendPump
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as pb_grpc
from tests.kv_peers import LAYOUT, PATIENCE_S, Duo, hello_of

NUM_FAREWELLS = 20


class BriefReceiver:
    """Ends every stream at once, with much to say."""

    async def serve(self, messages: AsyncIterator[pb.SenderMessage], reply: ControlReply) -> None:
        for index in range(NUM_FAREWELLS):
            reply(nack(TransferId(f"t{index}"), NackReason.CLOSED, "closing"))


async def _silence() -> AsyncIterator[pb.SenderMessage]:
    await asyncio.Event().wait()
    yield pb.SenderMessage()


async def test_what_is_said_just_before_a_stream_ends_arrives() -> None:
    server = create_server()
    pb_grpc.add_KvTransferServicer_to_server(KvTransferService(BriefReceiver()), server)  # type: ignore[arg-type]
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    channel = connect(f"127.0.0.1:{port}")
    try:
        async with asyncio.timeout(PATIENCE_S):
            heard = [message.nack.transfer_id async for message in pb_grpc.KvTransferStub(channel).Control(_silence())]
    finally:
        await channel.close()
        await server.stop(None)
    assert heard == [f"t{index}" for index in range(NUM_FAREWELLS)]


async def test_a_defect_in_the_listener_loses_the_pair_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        stream = duo.dialer.streams[0]
        await stream.until_heard("reserved")

        def explode(*args: object) -> None:
            raise KeyError("a defect")

        monkeypatch.setattr(SendLink, "grant", explode)
        stream.to_sender.put_nowait(pb.ReceiverMessage(credit=pb.Credit(bytes=1)))
        assert await duo.sent.outcome(transfer_id) == "peer_lost"
        assert "a defect" in duo.sent.told[transfer_id][0][1]
        assert any(record.exc_info for record in caplog.records)


async def _only(message: pb.SenderMessage) -> AsyncIterator[pb.SenderMessage]:
    yield message


async def test_an_older_incarnation_is_refused_after_the_newer_one_left() -> None:
    async with Duo() as duo:
        await duo.receiver.serve(_only(hello_of(epoch=5)), lambda message: None)
        with pytest.raises(RejectedError) as rejected:
            await duo.receiver.serve(_only(hello_of(epoch=4)), lambda message: None)
        assert rejected.value.reason is RejectReason.STALE_EPOCH
        await duo.receiver.serve(_only(hello_of(epoch=5)), lambda message: None)  # the same one may come back


async def test_a_stream_that_never_says_hello_is_ended() -> None:
    async with Duo(KvTransferConfig(backend="memory", connect_timeout_s=0.1)) as duo:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(DeadlineExceeded, match="hello"):
                await duo.receiver.serve(_silence(), lambda message: None)


async def test_an_idle_pump_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[SendPump] = []
    look = SendPump._look_after_link

    def counted(pump: SendPump) -> None:
        looks.append(pump)
        look(pump)

    monkeypatch.setattr(SendPump, "_look_after_link", counted)
    async with Duo() as duo:
        transfer_id, _, _ = await duo.begin("a", num_tokens=8)
        duo.sender.push(transfer_id, range(LAYOUT.num_layers), range(8))
        duo.sender.commit(transfer_id, 1)
        assert await duo.sent.outcome(transfer_id) == "acked"
        await asyncio.sleep(1.0)  # twice as long as an idle pump waits before it looks after frames in flight
        assert len(looks) <= 3  # what was in flight, and being woken when the transfer ended
