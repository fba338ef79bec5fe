"""Core types survive the wire; what the wire cannot mean is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ProtocolError, RejectedError, RejectReason
from core.ids import Epoch, RequestId, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEventBatch, Tier
from core.membership import LoadReport
from core.request import (
    Finish,
    FinishReason,
    GenerateRequest,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from protos import codec, inference_pb2, worker_pb2

SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 100),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    max_tokens=st.integers(1, 1000),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.none() | st.integers(0, 20),
)
HASHES = st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(tuple)
REQUESTS = st.builds(
    GenerateRequest,
    request_id=st.just(RequestId("r")),
    prompt_token_ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5).map(tuple),
    sampling=SAMPLING,
    block_hashes=HASHES,
    tenant=st.text(max_size=3),
    shared_salt=st.text(max_size=3),
    adapter=st.text(max_size=3),
)
FINISHES = st.builds(
    Finish, st.sampled_from(FinishReason), st.none() | st.integers(0, 99) | st.text(min_size=1, max_size=3)
)
ALTERNATIVES = st.lists(st.builds(TokenLogprob, st.integers(0, 99), st.floats(-50, 0)), max_size=2).map(tuple)
TOKENS = st.builds(TokenOutput, st.integers(0, 99), st.integers(0, 99), st.none() | st.floats(-50, 0), ALTERNATIVES)
OUTPUTS = st.builds(
    RequestOutput, st.just(RequestId("r")), st.lists(TOKENS, max_size=3).map(tuple), st.none() | FINISHES
)
EVENTS = (
    st.builds(BlocksStored, st.binary(min_size=16, max_size=16), HASHES, st.sampled_from(Tier))
    | st.builds(BlocksRemoved, HASHES, st.sampled_from(Tier))
    | st.just(CacheCleared())
)


@given(REQUESTS)
def test_requests_survive(request: GenerateRequest) -> None:
    wire = worker_pb2.WorkRequest.FromString(codec.request_to_wire(request).SerializeToString())
    assert codec.request_from_wire(wire) == request


@given(st.lists(OUTPUTS, max_size=3))
def test_outputs_survive(outputs: list[RequestOutput]) -> None:
    wire = worker_pb2.OutputBatch.FromString(codec.outputs_to_wire(outputs).SerializeToString())
    assert codec.outputs_from_wire(wire) == outputs


@given(st.lists(EVENTS, max_size=4).map(tuple))
def test_kv_events_survive(events: tuple[BlocksStored | BlocksRemoved | CacheCleared, ...]) -> None:
    batch = KvEventBatch(WorkerId("w"), Epoch(3), 7, events)
    wire = worker_pb2.KvEventBatch.FromString(codec.kv_events_to_wire(batch).SerializeToString())
    assert codec.kv_events_from_wire(wire) == batch


@pytest.mark.parametrize("reason", RejectReason)
def test_rejections_survive(reason: RejectReason) -> None:
    wire = codec.rejection_to_wire(RequestId("r"), RejectedError(reason, "detail", 0.5), LoadReport(num_running=3))
    back = codec.rejection_from_wire(wire)
    assert (back.reason, back.detail, back.retry_after_s) == (reason, "detail", 0.5)
    assert codec.load_from_wire(wire.load).num_running == 3


def test_load_survives() -> None:
    load = LoadReport(sequence=1, num_running=2, free_blocks=3, decode_step_s=0.25)
    assert codec.load_from_wire(codec.load_to_wire(load)) == load


def test_absent_sampling_fields_take_the_given_defaults() -> None:
    message = inference_pb2.SamplingParams(top_p=0.5)
    assert codec.sampling_from_wire(message, max_tokens=7) == SamplingParams(top_p=0.5, max_tokens=7)
    assert codec.sampling_from_wire(inference_pb2.SamplingParams(max_tokens=3), max_tokens=7).max_tokens == 3


def test_unknown_words_are_protocol_errors() -> None:
    with pytest.raises(ProtocolError, match="finish reason"):
        codec.finish_from_wire(worker_pb2.WorkFinish())
    with pytest.raises(ProtocolError, match="reject reason"):
        codec.rejection_from_wire(worker_pb2.Rejected(reason="weather"))
    with pytest.raises(ProtocolError, match="tier"):
        codec.chain_from_wire(worker_pb2.CachedChain.FromString(b"\x18\x09"))  # tier 9 of a later version
    with pytest.raises(ProtocolError, match="KV event"):
        codec.kv_events_from_wire(worker_pb2.KvEventBatch(events=[worker_pb2.KvEvent()]))
