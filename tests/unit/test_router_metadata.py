"""The account beside an answer: JSON can say all of it."""

import json
from dataclasses import replace

import pytest

from core.ids import RequestId, WorkerId
from core.membership import Role, WorkerRecord, WorkerState
from core.request import Finish, FinishReason, GenerateRequest, SamplingParams
from router.generation.answer import Answer
from router.generation.metadata import response_headers, response_metadata
from router.generation.provenance import Provenance
from router.messages import KvLanded
from router.reading_turns import ReadingTurns
from router.routing.modes import Binding, Mode, ModeReason
from router.stream import Completion, Placement
from router.timeline import TimingSplit

LANDED = KvLanded(0.5, 0.25, 4, 12, 4096, "int8", kv_lossless=False, kv_wire_bytes=1024)
PLACEMENT = Placement(
    WorkerId("p0"), WorkerId("d0"), "cheapest", Mode.REMOTE_PREFILL, ModeReason.CHEAPEST, Binding.EARLY, 0.3, 0.02, 0.1
)
COMPLETION = Completion(
    Finish(FinishReason.STOP),
    prompt_tokens=16,
    completion_tokens=3,
    cached_tokens=8,
    timing=TimingSplit(0.1, 0.2, 0.3, 0.6, 0.05, 1.0),
    landed=LANDED,
    placement=PLACEMENT,
    num_asked=2,
)
ALONE = replace(
    COMPLETION,
    landed=None,
    placement=replace(PLACEMENT, prefill_worker=None, binding=None, predicted_ttft_s=float("inf")),
)


def answer(model: str = "modèle\r\nx: y") -> Answer:
    request = GenerateRequest(RequestId("r"), (1, 2), SamplingParams(seed=2**64 - 1))
    provenance = Provenance("w1", "bfloat16", "")
    return Answer((request,), model, provenance, turns=ReadingTurns(), end=lambda *_: None, on_over=lambda: None)


def test_the_account_of_every_choice() -> None:
    told = response_metadata(answer(), {1: ALONE, 0: COMPLETION})
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["request_id"], told["seed"]) == ("r", 2**64 - 1)
    assert told["provenance"] == {"weights_version": "w1", "dtype": "bfloat16", "engine_version": ""}
    first, second = told["choices"]
    assert (first["index"], first["prefill_worker"], first["decode_worker"]) == (0, "p0", "d0")
    assert (first["mode"], first["mode_reason"], first["binding"]) == (
        "remote_prefill",
        str(ModeReason.CHEAPEST),
        "early",
    )
    assert (first["cached_tokens"], first["attempts"], first["lossless"]) == (8, 2, False)
    assert first["kv"] == {
        "profile": "int8", "bytes": 4096, "wire_bytes": 1024, "tokens_sent": 12, "tokens_held": 4,
    }  # fmt: skip
    timing = first["timing"]
    assert timing["queue_s"] + timing["route_s"] + timing["prefill_s"] == pytest.approx(timing["ttft_s"])
    assert (timing["transfer_s"], timing["first_decode_s"]) == (0.5, 0.25)
    assert first["predicted"] == {"ttft_s": 0.3, "tpot_s": 0.02}
    assert (second["prefill_worker"], second["kv"], second["lossless"], second["binding"]) == (None, None, True, None)
    assert second["predicted"]["ttft_s"] is None


def test_headers_cannot_be_injected_and_leave_out_what_is_not_known() -> None:
    assert response_headers(answer()) == {
        "x-tandem-model": "mod?le??x: y",
        "x-tandem-seed": str(2**64 - 1),
        "x-tandem-weights-version": "w1",
        "x-tandem-dtype": "bfloat16",
    }


def test_provenance_is_what_a_worker_says_of_itself() -> None:
    record = WorkerRecord.model_validate(
        {"worker_id": "p0", "role": Role.PREFILL, "epoch": 1, "state": WorkerState.READY,
         "weights_version": "w", "dtype": "float32", "engine_version": "tandem-1/torch-2"}
    )  # fmt: skip
    assert Provenance.of(record) == Provenance("w", "float32", "tandem-1/torch-2")
    assert Provenance.of(None) == Provenance()
