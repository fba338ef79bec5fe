"""Control streams that end badly, come too early, too late or from the past: somebody is always told."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from core.ids import TransferId
from core.rpc import bind, connect, create_server
from kv_transfer.control import ControlReply, nack
from kv_transfer.rpc import KvTransferService
from kv_transfer.send_pump import SendPump
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as pb_grpc
from tests.kv_peers import PATIENCE_S, Duo

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

        monkeypatch.setattr(SendPump, "grant", explode)
        stream.to_sender.put_nowait(pb.ReceiverMessage(credit=pb.Credit(bytes=1)))
        assert await duo.sent.outcome(transfer_id) == "peer_lost"
        assert "a defect" in duo.sent.told[transfer_id][0][1]
        assert any(record.exc_info for record in caplog.records)
