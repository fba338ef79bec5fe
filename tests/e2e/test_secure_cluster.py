"""A cluster with TLS at its doors, mutual TLS inside, and access control: all of it from the command line."""

import asyncio
import ssl
from urllib.parse import urlsplit

import grpc
import httpx
import pytest

from core.errors import PermissionDenied, ServingError, Unauthenticated
from core.rpc import connect
from core.tls import ClientTls
from protos import worker_pb2, worker_pb2_grpc
from tandem_client import Client
from tests.certificates import Authority
from tests.e2e.cluster_process import running_cluster, tandem, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_a_secured_cluster_serves_those_who_may_and_nobody_else(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, certificates = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("certificates")
    public, internal = Authority(certificates, "public"), Authority(certificates, "internal")
    door, node = public.issue("door"), internal.issue("node", ["tandem.internal"])
    logs = folder / "logs"
    access = {"enabled": True, "keys_file": "keys.yaml", "audit_file": "logs/audit.jsonl", "reload_interval_s": 0.05}
    config = tiny_config(
        "secure",
        replicas=1,
        router={"port": 0, "access": access, "routing": {"modes": ["remote_prefill"], "late_binding": False}},
        log_folder=str(logs),
        log_level="DEBUG",
        tls={
            "public": {"certificate": str(door.certificate), "private_key": str(door.private_key)},
            "client": {"ca": str(public.ca)},
            "internal": {
                "certificate": str(node.certificate),
                "private_key": str(node.private_key),
                "ca": str(internal.ca),
                "server_name": "tandem.internal",
            },
        },
    )
    logs.mkdir()
    code, made, _ = await tandem(folder, "keys", "create", "ann", "--tenant", "acme", "--file", "keys.yaml")
    assert code == 0
    ann = made[0]
    tls = ClientTls(ca=public.ca)
    async with running_cluster(folder, config) as cluster:
        record = cluster.record
        # The command finds everything in the run file.
        code, out, err = await tandem(folder, "generate", "import os", "-t", "0", "-n", "8", "--why")
        assert code == 0, err
        text = "\n".join(out)
        code, made, err = await tandem(folder, "keys", "create", "bob", "--tenant", "bobs")
        assert code == 0, err
        bob = made[0]
        # A user knows the address, the authority and a key; KV crossed between two workers for the answer.
        for key, tenant in ((ann, "acme"), (bob, "bobs")):
            async with Client(cluster.address, api_key=key, tls=tls) as client:
                answer = await client.generate_text("import os", temperature=0.0, max_tokens=8)
                assert answer.text == text
                assert answer.summary.placement.kv_bytes > 0, tenant
                with pytest.raises(PermissionDenied):
                    await client.status()
        async with Client(cluster.address, api_key=record.api_key, tls=tls) as client:
            workers = (await client.status()).workers
        await refused(Client(cluster.address, tls=tls), Unauthenticated)
        await refused(Client(cluster.address, api_key=ann), ServingError)  # without TLS
        await refused(Client(cluster.address, api_key=ann, tls=ClientTls(ca=internal.ca)), ServingError)
        await refused(Client(cluster.address, api_key=bob, tls=tls, tenant="acme"), PermissionDenied)
        # HTTP is the same door.
        url = record.http.split(",")[0]
        assert url.startswith("https://")
        body = {"prompt": "import os", "max_tokens": 8, "temperature": 0}
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=public.ca), timeout=30) as http:
            answered = await http.post(f"{url}/completions", json=body, headers={"authorization": f"Bearer {ann}"})
            assert answered.json()["choices"][0]["text"] == text
            assert (await http.post(f"{url}/completions", json=body)).status_code == 401
        parts = urlsplit(url)
        async with httpx.AsyncClient(timeout=10) as http:
            with pytest.raises(httpx.TransportError):
                await http.get(f"http://{parts.netloc}/live")
        # Workers talk to their own authority's processes only.
        ours = ClientTls(
            ca=internal.ca, certificate=node.certificate, private_key=node.private_key, server_name="tandem.internal"
        )
        stranger = ours.model_copy(update={"certificate": door.certificate, "private_key": door.private_key})
        nameless = ours.model_copy(update={"server_name": ""})
        silent = ours.model_copy(update={"certificate": None, "private_key": None})
        for worker in workers:
            assert await talks(worker.role, worker.address, ours)
            for wrong in (None, tls, stranger, nameless, silent):
                assert not await talks(worker.role, worker.address, wrong)
        # A revoked key is refused within a moment.
        code, out, err = await tandem(folder, "keys", "list")
        fingerprint = next(line.split()[0] for line in out if " bob " in line)
        assert (await tandem(folder, "keys", "revoke", fingerprint))[0] == 0
        await refused(Client(cluster.address, api_key=bob, tls=tls), Unauthenticated)
        secrets = [ann, bob, record.api_key]
    told = "".join(cluster.lines) + "".join(path.read_text() for path in logs.iterdir())
    assert "RevokeApiKey" in (logs / "audit.jsonl").read_text()
    for secret in secrets:
        assert secret not in told
        assert secret[-20:] not in told
    assert "PRIVATE KEY" not in told


async def refused(client: Client, error: type[ServingError]) -> None:
    async with client, asyncio.timeout(30):
        with pytest.raises(error):
            await client.generate_text("import os", max_tokens=2)


async def talks(role: str, address: str, tls: ClientTls | None) -> bool:
    """Say whether a worker answers; False: there is no connection."""
    stub = worker_pb2_grpc.PrefillWorkerStub if role == "prefill" else worker_pb2_grpc.DecodeWorkerStub
    async with connect(address, tls) as channel:
        try:
            await stub(channel).ListCachedBlocks(worker_pb2.ListCachedBlocksRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
    return True
