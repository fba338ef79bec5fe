"""A gateway whose doors ask for client certificates: both of them, and callers that are known by theirs alone."""

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from core.rpc import connect
from core.tls import ClientTls
from protos import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from router.access.keys import hash_of, new_key
from tests.certificates import Authority, Issued
from tests.fakes.cluster import FakeCluster, fake_cluster, text_request
from tests.fakes.reading import Reading

KEY = new_key()
BODY = {"model": "fake", "prompt": "hello", "max_tokens": 3, "temperature": 0}


@dataclass
class TlsDoors:
    cluster: FakeCluster
    doors_ca: Path

    async def over_grpc(self, shown: Issued | None, key: str = "") -> str | grpc.StatusCode:
        """Return the tenant that a generation was for, or how it failed."""
        tls = ClientTls(ca=self.doors_ca)
        if shown is not None:
            tls = ClientTls(ca=self.doors_ca, certificate=shown.certificate, private_key=shown.private_key)
        metadata = [("authorization", f"Bearer {key}")] if key else None
        async with connect(self.cluster.address, tls) as channel:
            reading = Reading(inference_pb2_grpc.InferenceStub(channel).Generate(text_request(), metadata=metadata))
            try:
                await reading.read_all()
            except grpc.aio.AioRpcError as error:
                return error.code()
        return self.cluster.prefills[0].submits[-1].request.tenant

    async def over_http(self, shown: Issued | None, key: str = "") -> str | int:
        """Likewise; 0: no connection."""
        context = ssl.create_default_context(cafile=self.doors_ca)
        if shown is not None:
            context.load_cert_chain(shown.certificate, shown.private_key)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = f"https://{self.cluster.gateway.http_address}/v1/completions"
        async with httpx.AsyncClient(verify=context, timeout=10) as http:
            try:
                response = await http.post(url, json=BODY, headers=headers)
            except httpx.TransportError:
                return 0
        return self.cluster.prefills[0].submits[-1].request.tenant if response.is_success else response.status_code


@asynccontextmanager
async def tls_doors(checkpoint: Path, folder: Path, *, clients: Authority | None) -> AsyncIterator[TlsDoors]:
    doors = Authority(folder, "doors")
    issued = doors.issue("door")
    tls = {"certificate": issued.certificate, "private_key": issued.private_key}
    access: dict[str, Any] = {
        "enabled": True,
        "keys": [{"name": "ann", "sha256": hash_of(KEY), "tenant": "keyed"}],
        "certificates": [{"name": "batch.acme.example", "tenant": "acme"}, {"name": "by-name", "tenant": "named"}],
    }
    if clients is not None:
        tls["client_ca"] = clients.ca
        access["audit_file"] = folder / "audit.jsonl"
    async with fake_cluster(checkpoint, tls=tls, access=access, is_waited_for=False) as cluster:
        await cluster.wait_live(2)
        yield TlsDoors(cluster, doors.ca)


async def test_a_certificate_is_a_caller_at_both_doors(checkpoint: Path, tmp_path: Path) -> None:
    clients, stranger = Authority(tmp_path, "clients"), Authority(tmp_path, "stranger")
    acme = clients.issue("whoever", ["batch.acme.example"])
    named = clients.issue("by-name", [])
    unknown = clients.issue("nobody", ["nobody.example"])
    posing = stranger.issue("whoever", ["batch.acme.example"])
    async with tls_doors(checkpoint, tmp_path, clients=clients) as doors:
        for shown, key, tenant in (
            (acme, "", "acme"),
            (named, "", "named"),
            (acme, KEY, "keyed"),  # a header says more than a certificate
            (unknown, KEY, "keyed"),
        ):
            assert await doors.over_grpc(shown, key) == tenant
            assert await doors.over_http(shown, key) == tenant
        for shown, key in ((unknown, ""), (acme, "wrong")):
            assert await doors.over_grpc(shown, key) is grpc.StatusCode.UNAUTHENTICATED
            assert await doors.over_http(shown, key) == 401
        for refused in (posing, None):
            assert await doors.over_grpc(refused, KEY) is grpc.StatusCode.UNAVAILABLE
            assert await doors.over_http(refused, KEY) == 0


async def test_what_is_refused_to_a_certificate_is_written_down(checkpoint: Path, tmp_path: Path) -> None:
    clients = Authority(tmp_path, "clients")
    async with tls_doors(checkpoint, tmp_path, clients=clients) as doors:
        for shown in (clients.issue("by-name", []), clients.issue("nobody", [])):
            tls = ClientTls(ca=doors.doors_ca, certificate=shown.certificate, private_key=shown.private_key)
            async with connect(doors.cluster.address, tls) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await admin_pb2_grpc.AdminStub(channel).RevokeApiKey(admin_pb2.RevokeApiKeyRequest(fingerprint="0"))
        lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["who"], line["action"], line["outcome"]) for line in lines] == [
        ("by-name", "RevokeApiKey", "missing_role"),
        ("", "RevokeApiKey", "missing_credential"),
    ]


async def test_without_a_client_authority_certificates_mean_nothing(checkpoint: Path, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    posing = stranger.issue("whoever", ["batch.acme.example"])
    async with tls_doors(checkpoint, tmp_path, clients=None) as doors:
        assert await doors.over_grpc(None, KEY) == await doors.over_http(None, KEY) == "keyed"
        assert await doors.over_grpc(posing) is grpc.StatusCode.UNAUTHENTICATED
        assert await doors.over_http(posing) == 401
