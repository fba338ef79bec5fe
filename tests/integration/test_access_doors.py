"""Both doors of a gateway with access control: who gets in, as whom, and what of it reaches workers and logs."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from protos import admin_pb2
from protos import inference_pb2 as pb
from router.access.keys import hash_of, new_key
from tests.fakes.cluster import FakeCluster, fake_cluster, text_request
from tests.fakes.reading import Reading
from tests.issuer import AUDIENCE, ISSUER, Issuer

KEYS = {name: new_key() for name in ("ann", "bob", "ops", "root", "old", "gone")}
KEPT = [
    {"name": "ann", "sha256": hash_of(KEYS["ann"]), "tenant": "acme"},
    {"name": "bob", "sha256": hash_of(KEYS["bob"]), "tenant": "bobs"},
    {"name": "ops", "sha256": hash_of(KEYS["ops"]), "roles": ["admin"]},
    {"name": "root", "sha256": hash_of(KEYS["root"]), "roles": ["admin", "inference"], "tenant": "roots"},
    {"name": "old", "sha256": hash_of(KEYS["old"]), "expires_at": datetime(2020, 1, 1, tzinfo=UTC)},
    {"name": "gone", "sha256": hash_of(KEYS["gone"]), "revoked_at": datetime(2020, 1, 1, tzinfo=UTC)},
]
BODY = {"model": "fake", "prompt": "hello", "max_tokens": 3, "temperature": 0}
TENANT_HEADERS = ("x-tandem-tenant", "x_tandem_tenant", "X-Tandem-Tenant", "x-llm-d-inference-fairness-id")


@dataclass
class Doors:
    """A gateway with access control, seen through both."""

    cluster: FakeCluster
    http: httpx.AsyncClient

    def generate(self, key: str, request: pb.GenerateRequest, **more: str) -> Reading:
        metadata = [("authorization", f"Bearer {key}"), *more.items()]
        return Reading(self.cluster.inference.Generate(request, metadata=metadata))

    async def post(self, key: str, headers: Mapping[str, str] | None = None, **changes: Any) -> httpx.Response:
        said = {"authorization": f"Bearer {key}", **(headers or {})}
        return await self.http.post("/v1/completions", json=BODY | changes, headers=said)

    @property
    def tenants(self) -> list[str]:
        """Of the requests that reached the prefill worker."""
        return [submit.request.tenant for submit in self.cluster.prefills[0].submits]


@asynccontextmanager
async def doors_of(checkpoint: Path, access: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[Doors]:
    access = {"enabled": True, "keys": KEPT, **(access or {})}
    async with (
        fake_cluster(checkpoint, access=access, **config) as cluster,
        httpx.AsyncClient(base_url=f"http://{cluster.gateway.http_address}", timeout=10) as http,
    ):
        yield Doors(cluster, http)


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return what the status details say."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    raise AssertionError("no ErrorInfo")


BAD: dict[str, tuple[Sequence[str], str]] = {
    "none": ([], "missing_credential"),
    "malformed": (["Bearer"], "malformed_credential"),
    "other scheme": ([f"Basic {KEYS['ann']}"], "malformed_credential"),
    "no scheme": ([KEYS["ann"]], "malformed_credential"),
    "two headers": ([f"Bearer {KEYS['ann']}"] * 2, "malformed_credential"),
    "two credentials": ([f"Bearer {KEYS['ann']}, Bearer {KEYS['ann']}"], "malformed_credential"),
    "huge": (["Bearer " + "x" * 15_000], "malformed_credential"),
    "unknown": ([f"Bearer {new_key()}"], "invalid_credential"),
    "its hash": ([f"Bearer {hash_of(KEYS['ann'])}"], "invalid_credential"),
    "expired": ([f"Bearer {KEYS['old']}"], "key_expired"),
    "revoked": ([f"Bearer {KEYS['gone']}"], "key_revoked"),
    "a token": (["Bearer aaaa.bbbb.cccc"], "invalid_credential"),
}


async def test_a_bad_credential_opens_neither_door(checkpoint: Path) -> None:
    async with doors_of(checkpoint, {"max_credential_bytes": 4096}) as doors:
        for name, (values, reason) in BAD.items():
            headers = [("authorization", value) for value in values]
            call = doors.cluster.inference.Generate(text_request(), metadata=headers)
            failure = await Reading(call).fails(grpc.StatusCode.UNAUTHENTICATED)
            assert reason_of(failure) == reason.upper(), name
            answer = await doors.http.post("/v1/completions", json=BODY, headers=headers)
            assert answer.status_code == 401, name
            assert answer.headers["www-authenticate"].startswith("Bearer"), name
            error = answer.json()["error"]
            assert error["message"] == failure.details(), name
            assert error["code"] == "invalid_api_key"
            assert not any(secret in error["message"] for secret in KEYS.values())
        binary = doors.cluster.inference.Generate(text_request(), metadata=[("authorization-bin", b"\x00")])
        await Reading(binary).fails(grpc.StatusCode.UNAUTHENTICATED)
        assert doors.tenants == []
        exposition = (await doors.http.get("/metrics", headers={"authorization": f"Bearer {KEYS['ops']}"})).text
        assert 'tandem_gateway_rejected_total{reason="key_revoked"} 2.0' in exposition


async def test_what_strangers_send_is_not_read(checkpoint: Path) -> None:
    async with doors_of(checkpoint, max_request_bytes=10_000, http={"max_body_bytes": 10_000}) as doors:
        metadata = [("authorization", f"Bearer {new_key()}")]
        for content in (b"\xff" * 100, b"x" * 100_000):  # no message; more than may be sent
            for method in ("Inference/Generate", "Inference/Abort", "Admin/RevokeApiKey"):
                begin: Any = doors.cluster.channel.stream_stream(f"/tandem.v1.{method}")
                call = begin(iter([content]), metadata=metadata)
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED, method
            answer = await doors.http.post("/v1/completions", content=content, headers=dict(metadata))
            assert answer.status_code == 401


async def test_unicode_and_line_ends_in_headers_are_refused(checkpoint: Path) -> None:
    async with doors_of(checkpoint) as doors:
        for value in ("Bearer schlüssel".encode(), b"Bearer \xff\xfe", f"Bearer {KEYS['ann']}\tx".encode()):
            answer = await doors.http.post("/v1/completions", json=BODY, headers=[(b"authorization", value)])
            assert answer.status_code in (400, 401)
        assert doors.tenants == []


async def test_the_key_s_tenant_is_what_everything_behind_the_doors_sees(checkpoint: Path) -> None:
    async with doors_of(checkpoint) as doors:
        for asked in ("", "acme"):
            await doors.generate(KEYS["ann"], text_request(tenant=asked)).read_all()
        assert (await doors.post(KEYS["ann"])).status_code == 200
        await doors.generate(KEYS["bob"], text_request()).read_all()
        await doors.generate(KEYS["root"], text_request(tenant="acme")).read_all()
        assert (await doors.post(KEYS["root"], {"x-tandem-tenant": "acme"})).status_code == 200
        assert doors.tenants == ["acme", "acme", "acme", "bobs", "acme", "acme"]
        hashes = [tuple(one.request.block_hashes) for one in doors.cluster.prefills[0].submits]
        assert hashes[0] == hashes[1]
        assert hashes[0] != hashes[3]  # equal prompts of two tenants share no block


async def test_tenants_of_one_group_share_prefixes_and_nothing_else(checkpoint: Path) -> None:
    tenants = {"acme": {"prefix_group": "roots"}, "bobs": {"prefix_group": "roots"}}  # a tenant is called like that
    async with doors_of(checkpoint, tenants=tenants) as doors:
        for name in ("ann", "bob", "root"):
            await doors.generate(KEYS[name], text_request("what they all ask")).read_all()
        ann, bob, root = (one.request for one in doors.cluster.prefills[0].submits)
        assert (ann.tenant, bob.tenant) == ("acme", "bobs")
        assert list(ann.block_hashes) == list(bob.block_hashes) != []
        assert ann.shared_salt == bob.shared_salt != root.shared_salt
        assert not set(ann.block_hashes) & set(root.block_hashes)


async def test_nobody_but_an_admin_names_another_tenant(checkpoint: Path) -> None:
    async with doors_of(checkpoint) as doors:
        denied = grpc.StatusCode.PERMISSION_DENIED
        for request in (text_request(tenant="bobs"), text_request(tenant="ACME"), text_request(tenant="acme/..")):
            failure = await doors.generate(KEYS["ann"], request).fails(denied)
            assert reason_of(failure) == "OTHER_TENANT"
        for name in TENANT_HEADERS:
            reading = doors.generate(KEYS["ann"], text_request(), **{name.lower(): "bobs"})
            await reading.fails(denied)
            answer = await doors.post(KEYS["ann"], {name: "bobs"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "other_tenant"), name
            stream = await doors.http.get(
                "/v1/streams/r", headers={"authorization": f"Bearer {KEYS['ann']}", name: "bobs"}
            )
            assert stream.status_code == 403, name
        assert doors.tenants == []
        metadata = [("authorization", f"Bearer {KEYS['ann']}")]
        chat = doors.cluster.inference.Chat(
            pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x")], terms=pb.RequestTerms(tenant="bobs")),
            metadata=metadata,
        )
        resume = doors.cluster.inference.Resume(pb.ResumeRequest(request_id="r", tenant="bobs"), metadata=metadata)
        for call in (chat, resume):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            assert caught.value.code() is denied
        with pytest.raises(grpc.aio.AioRpcError) as aborted:
            await doors.cluster.inference.Abort(pb.AbortRequest(request_id="r", tenant="bobs"), metadata=metadata)
        assert aborted.value.code() is denied


async def test_quotas_count_the_key_s_tenant(checkpoint: Path) -> None:
    tenants = {"acme": {"requests_per_minute": 2}}
    async with doors_of(checkpoint, tenants=tenants) as doors:
        await doors.generate(KEYS["ann"], text_request()).read_all()
        assert (await doors.post(KEYS["ann"])).status_code == 200
        await doors.generate(KEYS["ann"], text_request()).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert (await doors.post(KEYS["ann"])).status_code == 429
        assert (await doors.post(KEYS["bob"])).status_code == 200


async def test_a_call_is_aborted_by_its_own_tenant_only(checkpoint: Path) -> None:
    async with doors_of(checkpoint) as doors:
        doors.cluster.prefills[0].script.go.clear()
        reading = doors.generate(KEYS["ann"], text_request(request_id="mine"))
        await doors.cluster.prefills[0].wait_submitted()

        async def abort(key: str, tenant: str = "") -> bool:
            request = pb.AbortRequest(request_id="mine", tenant=tenant)
            metadata = [("authorization", f"Bearer {key}")]
            return (await doors.cluster.inference.Abort(request, metadata=metadata)).found

        assert not await abort(KEYS["bob"])
        assert not await abort(KEYS["root"])
        assert await abort(KEYS["root"], "acme")
        await reading.fails(grpc.StatusCode.CANCELLED)


async def test_a_stream_is_resumed_by_its_own_tenant_only(checkpoint: Path) -> None:
    async with doors_of(checkpoint) as doors:
        doors.cluster.prefills[0].script.go.clear()
        begun = doors.generate(KEYS["ann"], text_request(request_id="mine", resume_window_s=30.0))
        await doors.cluster.prefills[0].wait_submitted()
        doors.cluster.prefills[0].script.go.set()
        await begun.read_all()

        async def resume(key: str, tenant: str = "") -> int:
            request = pb.ResumeRequest(request_id="mine", tenant=tenant)
            metadata = [("authorization", f"Bearer {key}")]
            return len([one async for one in doors.cluster.inference.Resume(request, metadata=metadata)])

        async def get(key: str) -> int:
            return (await doors.http.get("/v1/streams/mine", headers={"authorization": f"Bearer {key}"})).status_code

        for key in (KEYS["bob"], KEYS["root"]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await resume(key)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert await get(key) == 404
        assert await resume(KEYS["ann"]) > 1
        assert await resume(KEYS["root"], "acme") > 1
        assert (await doors.http.get("/v1/streams/mine")).status_code == 401


async def test_admin_calls_are_for_admins(checkpoint: Path) -> None:
    calls: dict[str, Any] = {
        "GetClusterStatus": admin_pb2.GetClusterStatusRequest(),
        "ListKvDecisions": admin_pb2.AdminListKvDecisionsRequest(),
        "ExplainRequest": admin_pb2.ExplainRequestRequest(),
        "ListApiKeys": admin_pb2.ListApiKeysRequest(),
        "CreateApiKey": admin_pb2.CreateApiKeyRequest(name="new"),
    }
    assert set(calls) | {"RevokeApiKey"} == set(admin_pb2.DESCRIPTOR.services_by_name["Admin"].methods_by_name)
    async with doors_of(checkpoint) as doors:
        for name, request in calls.items():
            call = getattr(doors.cluster.admin, name)
            for key, code in ((None, "UNAUTHENTICATED"), (KEYS["ann"], "PERMISSION_DENIED")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(request, metadata=[("authorization", f"Bearer {key}")] if key else None)
                assert caught.value.code() is grpc.StatusCode[code]
            await call(request, metadata=[("authorization", f"Bearer {KEYS['ops']}")])
        await doors.generate(KEYS["ops"], text_request()).fails(grpc.StatusCode.PERMISSION_DENIED)
        statuses = [
            (await doors.http.get("/metrics", headers={"authorization": f"Bearer {key}"})).status_code
            for key in (KEYS["ops"], KEYS["ann"], "x")
        ]
        assert statuses == [200, 403, 401]


async def test_probes_and_reflection_are_open_unless_configured(checkpoint: Path) -> None:
    async def is_open(doors: Doors) -> list[bool]:
        found = []
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(doors.cluster.channel)  # type: ignore[arg-type]
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        begins: tuple[Callable[[], Awaitable[Any]], ...] = (
            lambda: doors.cluster.health.Check(health_pb2.HealthCheckRequest()),
            lambda: anext(aiter(doors.cluster.health.Watch(health_pb2.HealthCheckRequest()))),
            lambda: anext(aiter(stub.ServerReflectionInfo(iter([ask])))),
        )
        for begin in begins:
            try:
                await begin()
                found.append(True)
            except grpc.aio.AioRpcError as error:
                found.append(error.code() is not grpc.StatusCode.UNAUTHENTICATED)
        for path in ("/health", "/live", "/ready", "/openapi.json", "/metrics"):
            found.append((await doors.http.get(path)).status_code != 401)
        return found

    async with doors_of(checkpoint) as doors:
        assert await is_open(doors) == [True] * 7 + [False]
    closed = {"open_health": False, "open_reflection": False, "open_metrics": True}
    async with doors_of(checkpoint, closed, is_waited_for=False) as doors:
        assert await is_open(doors) == [False] * 7 + [True]
        metadata = [("authorization", f"Bearer {KEYS['bob']}")]
        assert await doors.cluster.health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)


async def test_a_token_opens_both_doors(checkpoint: Path, issuer: Issuer, tmp_path: Path) -> None:
    key_set = tmp_path / "jwks.json"
    key_set.write_text(json.dumps(issuer.key_set()))
    jwt = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": key_set}
    async with doors_of(checkpoint, {"jwt": [jwt]}) as doors:
        await doors.generate(issuer.token(tenant="tokens"), text_request()).read_all()
        assert (await doors.post(issuer.token("ec", tenant="tokens"))).status_code == 200
        assert doors.tenants == ["tokens", "tokens"]
        await doors.generate(issuer.token(exp=1), text_request()).fails(grpc.StatusCode.UNAUTHENTICATED)
        assert (await doors.post(issuer.token(aud="other"))).status_code == 401
        assert (await doors.post(issuer.token(roles=["admin"]))).status_code == 403


async def test_secrets_are_in_no_log_metric_explanation_or_record(
    checkpoint: Path, issuer: Issuer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key_set, record = tmp_path / "jwks.json", tmp_path / "audit.jsonl"
    key_set.write_text(json.dumps(issuer.key_set()))
    jwt = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": key_set}
    token, expired, unknown = issuer.token(), issuer.token(exp=1), new_key()
    told: list[str] = []
    with caplog.at_level(logging.DEBUG):
        async with doors_of(checkpoint, {"jwt": [jwt], "audit_file": record}) as doors:
            for credential in (*KEYS.values(), token, expired, unknown):
                metadata = [("authorization", f"Bearer {credential}")]
                reading = Reading(doors.cluster.inference.Generate(text_request(), metadata=metadata))
                try:
                    await reading.read_all()
                except grpc.aio.AioRpcError as error:
                    told.append(str(error))
                told.append((await doors.post(credential)).text)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await doors.cluster.admin.RevokeApiKey(
                        admin_pb2.RevokeApiKeyRequest(fingerprint="nobody"), metadata=metadata
                    )
                told.append(str(caught.value))
            ops = [("authorization", f"Bearer {KEYS['ops']}")]
            told.append(str(await doors.cluster.admin.ExplainRequest(admin_pb2.ExplainRequestRequest(), metadata=ops)))
            told.append(str(await doors.cluster.admin.ListApiKeys(admin_pb2.ListApiKeysRequest(), metadata=ops)))
            told.append((await doors.http.get("/metrics", headers=dict(ops))).text)
            created = await doors.cluster.admin.CreateApiKey(admin_pb2.CreateApiKeyRequest(name="new"), metadata=ops)
            kept = {key: await doors.cluster.store.get(key) for key in await doors.cluster.store.scan("tandem:")}
    everything = "\n".join([*told, caplog.text, record.read_text(), repr(kept), repr(doors.cluster.gateway)])
    assert "ann" in everything  # names are there
    for secret in (*KEYS.values(), token, expired, unknown, created.secret):
        assert secret not in everything
        assert secret[-24:] not in everything


async def test_every_admin_action_is_written_down(checkpoint: Path, tmp_path: Path) -> None:
    record = tmp_path / "audit.jsonl"
    async with doors_of(checkpoint, {"audit_file": record}) as doors:
        ops, ann = ([("authorization", f"Bearer {KEYS[name]}")] for name in ("ops", "ann"))
        admin = doors.cluster.admin
        made = await admin.CreateApiKey(admin_pb2.CreateApiKeyRequest(name="new"), metadata=ops)
        await admin.RevokeApiKey(admin_pb2.RevokeApiKeyRequest(fingerprint=made.api_key.fingerprint), metadata=ops)
        await admin.GetClusterStatus(admin_pb2.GetClusterStatusRequest(), metadata=ops)
        for metadata, request in (
            (ann, admin_pb2.RevokeApiKeyRequest(fingerprint="x")),
            (None, admin_pb2.RevokeApiKeyRequest(fingerprint="x")),
            (ops, admin_pb2.RevokeApiKeyRequest(fingerprint='y"\n{}')),
            (ops, admin_pb2.RevokeApiKeyRequest(fingerprint="z" * 1000)),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await admin.RevokeApiKey(request, metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError):
            await admin.GetClusterStatus(admin_pb2.GetClusterStatusRequest(), metadata=ann)
        gateway_id = doors.cluster.gateway.front.gateway_id
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    found = [(line["who"], line["action"], line["target"], line["outcome"]) for line in lines]
    assert found == [
        ("ops", "CreateApiKey", made.api_key.fingerprint, "ok"),
        ("ops", "RevokeApiKey", made.api_key.fingerprint, "ok"),
        ("ann", "RevokeApiKey", "", "missing_role"),  # what they asked for was not even read
        ("", "RevokeApiKey", "", "missing_credential"),
        ("ops", "RevokeApiKey", 'y"\n{}', "invalid_argument"),
        ("ops", "RevokeApiKey", "z" * 200, "invalid_argument"),
        ("ann", "GetClusterStatus", "", "missing_role"),
    ]
    assert all(line["gateway"] == gateway_id and line["from"] for line in lines)
    assert all(datetime.fromisoformat(line["time"]).tzinfo is not None for line in lines)
