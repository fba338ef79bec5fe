"""Transfers under compression profiles between two workers: floors hold, lossy KV is private, decisions are told.

The model is the trained one and the lossy profile a very rough one, so that its KV, if it ever reached another request,
would be seen in that request's tokens.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from core.clock import MonotonicClock
from core.errors import ConfigError
from core.ids import RequestId
from core.kv_quality import EXACT
from core.membership import Role, WorkerIdentity, kv_controller_key
from core.request import GenerateRequest
from core.store_memory import MemoryStore
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from kv_transfer.codecs.spec import CODEC_VERSION, PipelineSpec, Quantiser
from kv_transfer.profile import CodecTime, Profile, ProfileLibrary, Quality, save_library
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.service import prefill_worker
from protos import codec, worker_pb2
from router.config import RouterConfig, TenantConfig
from router.service import Gateway
from tandem_client import Client
from tests.fake_model import greedy, run_to_end, token_ids
from tests.worker_pair import D, P, Pair, request, worker_pair
from tests.worker_side import Side
from tests.worker_stream import EPOCH

TINY = ModelConfig(path=Path(__file__).parents[2] / "models" / "tiny", dtype="float32")
ENGINE = EngineConfig(num_blocks=64, max_batch_tokens=64, num_threads=1, layer_group_size=2)
LINK = {"slot_bytes": 2**20, "credit_bytes": 2**22, "codec_threads": 1}
FREE = CodecTime(fixed_s=0.0, s_per_byte=0.0)
HARMFUL = Quality(
    agreement=0.6, agreement_low=0.5, agreement_high=0.7, kl=1.0, kl_low=0.9, kl_high=1.1,
    num_prompts=64, num_positions=1024, confidence=0.95,
)  # fmt: skip
PROMPT = tuple((37 * at + 11) % 500 + 3 for at in range(64))


def library(weights_version: str) -> ProfileLibrary:
    rough = PipelineSpec(k=Quantiser(levels=2), v=Quantiser(levels=2))
    return ProfileLibrary(
        model="test",
        weights_version=weights_version,
        codec_version=CODEC_VERSION,
        machine="test",
        profiles=(
            Profile(name="none", pipeline=PipelineSpec(kind="none"), ratio=1.0, encode=FREE, decode=FREE),
            Profile(name="lossless", pipeline=PipelineSpec(kind="lossless"), ratio=1.1, encode=FREE, decode=FREE),
            Profile(name="rough", pipeline=rough, ratio=16.0, encode=FREE, decode=FREE, quality=HARMFUL),
        ),
    )


def asked(name: str, prompt: tuple[int, ...] = PROMPT, floor: float = EXACT) -> GenerateRequest:
    return GenerateRequest(RequestId(name), prompt, greedy(12), kv_quality_floor=floor, tenant="lab")


@pytest.fixture(scope="module")
def alone() -> Engine:
    """One engine that does everything itself."""
    return Engine.load(TINY, ENGINE)


@pytest.fixture(scope="module")
def profiles(alone: Engine, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, object]:
    """Settings under which the rough profile is used wherever the floor allows it."""
    path = tmp_path_factory.mktemp("library") / "kv_profiles.yaml"
    save_library(library(alone.layout.weights_version), path)
    return {**LINK, "profiles": str(path), "policy": "rough"}


def tokens_alone(engine: Engine, one: GenerateRequest) -> list[int]:
    engine.add(one)
    return token_ids(run_to_end(engine)[one.request_id])


async def landed(pair: Pair, name: str) -> worker_pb2.KvLanded:
    report: worker_pb2.KvLanded = await pair.to_decode.answer("landed", name)
    return report


async def cached_on_decode(pair: Pair) -> set[bytes]:
    """Return the hashes that the decode worker says it could share; taken with the events that told of them."""
    snapshot = await pair.to_decode.list_cached_blocks()
    return {digest for chain in snapshot.chains for digest in chain.hashes}


async def test_lossy_kv_is_used_by_its_own_request_only(alone: Engine, profiles: Mapping[str, object]) -> None:
    expected = tokens_alone(alone, asked("reference"))
    async with worker_pair(model=TINY, engine=ENGINE, transfer=profiles) as pair:
        lossy = await pair.generate(asked("lossy", floor=0.5))
        told = await landed(pair, "lossy")
        assert (told.kv_profile, told.kv_lossless, told.kv_tokens_held) == ("rough", False, 0)
        assert told.kv_bytes == len(PROMPT) * alone.layout.bytes_per_token
        assert 0 < told.kv_wire_bytes < told.kv_bytes / 4
        assert lossy[0] == expected[0], "the first token is the prefill worker's own"
        assert lossy != expected, "the profile is too gentle for this test to see anything"
        assert await cached_on_decode(pair) == set()

        assert await pair.generate(asked("exact")) == expected
        told = await landed(pair, "exact")
        assert (told.kv_lossless, told.kv_tokens_held, told.kv_tokens_sent) == (True, 0, len(PROMPT))
        shared = await cached_on_decode(pair)
        assert len(shared) >= len(PROMPT) // ENGINE.block_size

        assert await pair.generate(asked("again", floor=0.5)) == expected, "what is held exactly is not sent again"
        told = await landed(pair, "again")
        assert (told.kv_lossless, told.kv_tokens_held, told.kv_wire_bytes) == (True, len(PROMPT), 0)
        await pair.until_idle()


async def test_a_prefix_that_was_held_exactly_stays_shared_when_the_rest_comes_lossy(
    alone: Engine, profiles: Mapping[str, object]
) -> None:
    longer = (*PROMPT[:32], *PROMPT[::-1])
    async with worker_pair(model=TINY, engine=ENGINE, transfer=profiles) as pair:
        await pair.generate(asked("exact", PROMPT[:32]))
        before = await cached_on_decode(pair)
        await pair.generate(asked("lossy", longer, floor=0.5))
        told = await landed(pair, "lossy")
        assert (told.kv_lossless, told.kv_tokens_held) == (False, 32)
        assert await cached_on_decode(pair) == before
        assert await pair.generate(asked("exact-2", longer)) == tokens_alone(alone, asked("reference-2", longer))
        assert (await landed(pair, "exact-2")).kv_tokens_held == 32
        await pair.until_idle()


async def test_the_floor_decides_and_every_decision_is_told(alone: Engine, profiles: Mapping[str, object]) -> None:
    async with worker_pair(model=TINY, engine=ENGINE, transfer=profiles) as pair:
        for name, floor in (("a", 0.5), ("b", 0.51), ("c", EXACT)):
            await pair.generate(asked(name, tuple(reversed(PROMPT[: 40 + len(name)])), floor))
            await pair.prefill_is_empty()
        reply = await pair.to_prefill.list_kv_decisions(2)
        assert (reply.worker_id, reply.epoch) == (P, EPOCH)
        assert [one.request_id for one in reply.decisions] == ["c", "b"], "the newest first"
        newest, oldest = reply.decisions[0], (await pair.to_prefill.list_kv_decisions(0)).decisions[-1]
        assert (newest.quality_floor, newest.reason) == (EXACT, "static_below_floor")
        assert newest.profile in ("none", "lossless")
        assert newest.carrier == "memory"
        assert (oldest.profile, oldest.quality_floor, oldest.reason) == ("rough", 0.5, "static")
        assert (oldest.tenant, oldest.peer, oldest.carrier, oldest.num_tokens) == ("lab", "d0", "memory", 41)
        assert oldest.raw_bytes == 41 * alone.layout.bytes_per_token
        assert oldest.HasField("outcome")
        assert oldest.outcome.failure == ""
        assert 0 < oldest.outcome.payload_bytes < oldest.raw_bytes
        assert json.loads(oldest.json)["transfer_id"] == oldest.transfer_id
        assert [one.profile for one in oldest.candidates] == ["rough"]


async def test_through_a_gateway_the_client_is_told_and_the_tenant_is_protected(
    alone: Engine, profiles: Mapping[str, object]
) -> None:
    config = RouterConfig(model_path=TINY.path, port=0, tenants={"bank": TenantConfig(kv_quality="exact")})
    store, expected = MemoryStore(), tokens_alone(alone, asked("reference-3"))
    async with worker_pair(model=TINY, engine=ENGINE, transfer=profiles, store=store):
        gateway = Gateway(config, "test", store, MonotonicClock(), rng=random.Random(1))
        address = await gateway.start()
        try:
            async with Client(address, tenant="lab") as lab, Client(address, tenant="bank") as bank:
                got = []
                for client in (lab, bank):
                    got.append(await client.generate_text(PROMPT, temperature=0.0, max_tokens=12, kv_quality=0.5))
                lossy, exact = (one.summary.placement for one in got)
                assert (lossy.kv_profile, lossy.kv_lossless) == ("rough", False)
                assert lossy.kv_wire_bytes < lossy.kv_bytes / 4
                assert (exact.kv_lossless, exact.kv_tokens_sent) == (True, len(PROMPT))
                assert [token.token_id for token in got[1].tokens] == expected
                decisions = await lab.kv_decisions()
                assert [(one.tenant, one.quality_floor) for one in decisions] == [("bank", 1.0), ("lab", 0.5)]
                assert decisions[1].profile == "rough"
        finally:
            await gateway.stop(1.0)


async def test_without_a_library_transfers_are_exact_whatever_is_asked_for() -> None:
    one = GenerateRequest(RequestId("a"), request("a", 20).prompt_token_ids, greedy(4), kv_quality_floor=0.0)
    async with worker_pair() as pair:
        await pair.generate(one)
        assert (await landed(pair, "a")).kv_lossless
        await pair.prefill_is_empty()
        (decision,) = (await pair.to_prefill.list_kv_decisions(0)).decisions
        assert {candidate.profile for candidate in decision.candidates} <= {"none", "lossless"}


def raw_submit(pair: Pair, name: str, **terms: Any) -> worker_pb2.PrefillSubmit:
    """Return a submission as no gateway of ours would send it: with these terms and no others."""
    return worker_pb2.PrefillSubmit(
        request=codec.request_to_wire(request(name, 20)),
        transfer_id=f"{name}/0",
        decode_worker_id=D,
        decode_epoch=EPOCH,
        decode_address=pair.decode_address,
        **terms,
    )


async def test_terms_that_a_gateway_leaves_open_are_the_workers_own() -> None:
    async with worker_pair(transfer={"quality": "high"}) as pair:
        for name, terms in (("a", {}), ("bb", {"kv_quality_floor": 0.0, "handoff_budget_s": 0.0})):
            await pair.submit_decode(request(name, 20))
            await pair.to_decode.answer("accepted", name)
            await pair.to_prefill.send(submit=raw_submit(pair, name, **terms))
            await pair.to_decode.until_finished(name)
        second, first = (await pair.to_prefill.list_kv_decisions(0)).decisions
        assert (first.quality_floor, first.HasField("budget_s")) == (0.99, False)
        assert (second.quality_floor, second.HasField("budget_s"), second.budget_s) == (0.0, True, 0.0)
        assert json.loads(second.json)["compute_s"] > 0, "the prompts that are queued take time"


async def test_what_should_be_cached_is_not_thought_to_take_time() -> None:
    async with worker_pair() as pair:
        expected = []
        for name, terms in (("a", {}), ("bb", {}), ("ccc", {"cached_tokens": 20})):
            await pair.submit_decode(request(name, 20))
            await pair.to_decode.answer("accepted", name)
            await pair.to_prefill.send(submit=raw_submit(pair, name, **terms))
            await pair.to_decode.until_finished(name)
            await pair.prefill_is_empty()
        for decision in reversed((await pair.to_prefill.list_kv_decisions(0)).decisions):
            expected.append(json.loads(decision.json)["compute_s"])
        assert expected[0] == 0.0, "no rate was measured yet"
        assert 0 < expected[2] < expected[1] / 4


@pytest.mark.parametrize("terms", [{"kv_quality_floor": 1.5}, {"handoff_budget_s": float("nan")}], ids=str)
async def test_terms_out_of_range_end_the_stream(terms: dict[str, float]) -> None:
    async with worker_pair() as pair:
        await pair.to_prefill.send(submit=raw_submit(pair, "a", **terms))
        error = await pair.to_prefill.until_over()
        assert error is not None
        assert "floor" in (error.details() or "")


async def test_what_the_controller_learned_is_kept_in_the_store() -> None:
    store = MemoryStore()
    async with worker_pair(store=store) as pair:
        for number in range(3):
            await pair.generate(request("x" * (number + 1), 20))
    assert await store.get(kv_controller_key("test", Role.PREFILL))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"profiles": "{of_another}"}, "not validated for this model.*other-weights.*fake"),
        ({"profiles": "{nowhere}"}, "nowhere"),
        ({"policy": "rough"}, "no profile 'rough'"),
    ],
    ids=["another model's", "not there", "a name that no library has"],
)
async def test_profiles_that_cannot_be_used_are_refused_at_start(
    settings: dict[str, str], problem: str, tmp_path: Path
) -> None:
    save_library(library("other-weights"), tmp_path / "other.yaml")
    places = {"of_another": tmp_path / "other.yaml", "nowhere": tmp_path / "nowhere.yaml"}
    transfer = {key: value.format(**places) for key, value in settings.items()}
    config = PrefillWorkerConfig.model_validate({"model": {"path": tmp_path}, "transfer": transfer})
    side = Side(16, 8)
    worker = prefill_worker(config, WorkerIdentity(P, EPOCH, "test"), MemoryStore(), load_engine=side.load)
    with pytest.raises(ConfigError, match=problem):
        await worker.start()


async def test_another_models_library_next_to_the_model_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_library(library("other-weights"), tmp_path / "kv_profiles.yaml")
    config = PrefillWorkerConfig.model_validate({"model": {"path": tmp_path}})
    side = Side(16, 8)
    worker = prefill_worker(config, WorkerIdentity(P, EPOCH, "test"), MemoryStore(), load_engine=side.load)
    await worker.start()
    await worker.stop(1.0)
    assert "not validated for this model" in caplog.text
