"""A client whose machine vanishes says nothing: no end of its stream, no end of its connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from core.rpc import connect
from protos import inference_pb2_grpc
from tests.fakes.cluster import fake_cluster, text_request
from tests.fakes.reading import Reading

NOTICED_WITHIN_S = 40.0  # keepalive asks after 5 s of silence and waits 10 s; the machine may be busy


class Wire:
    """A TCP wire to the gateway that can be cut without either end being told."""

    def __init__(self) -> None:
        self.is_cut = False
        self.port = 0
        self._pumps: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    @classmethod
    @asynccontextmanager
    async def to(cls, address: str) -> AsyncIterator["Wire"]:
        wire = cls()
        host, _, port = address.rpartition(":")

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            wire._writers += [writer, far_writer]
            for source, sink in ((reader, far_writer), (far_reader, writer)):
                wire._pumps.append(asyncio.create_task(wire._pump(source, sink)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        wire.port = server.sockets[0].getsockname()[1]
        try:
            yield wire
        finally:
            server.close()
            for pump in wire._pumps:
                pump.cancel()
            await asyncio.gather(*wire._pumps, return_exceptions=True)
            for writer in wire._writers:
                writer.transport.abort()
            await server.wait_closed()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if not self.is_cut:
                sink.write(data)
        if not self.is_cut:
            sink.close()


@pytest.mark.slow
async def test_keepalive_notices_and_frees_the_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, Wire.to(cluster.address) as wire:
        cluster.decodes[0].script.go.clear()
        async with connect(f"127.0.0.1:{wire.port}") as channel:
            reading = Reading(inference_pb2_grpc.InferenceStub(channel).Generate(text_request(request_id="lost")))
            await reading.read_tokens(1)
            wire.is_cut = True
            assert await cluster.gateway.dispatcher.wait_idle(NOTICED_WITHIN_S)
            await cluster.decodes[0].wait_aborted("lost")
            assert cluster.holds_nothing()
            error = await reading.fails(grpc.StatusCode.UNAVAILABLE)
            assert error.code() is grpc.StatusCode.UNAVAILABLE, "the client notices, too"
