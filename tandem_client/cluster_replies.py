"""Wire messages about the cluster to what the client hands out. Pure."""

import json

from protos import admin_pb2
from protos import inference_pb2 as pb
from tandem_client.cluster_types import (
    ClusterStatus,
    KvDecision,
    ModelInfo,
    RouteCandidate,
    RouteDecision,
    RouteOutcome,
    WorkerStatus,
)
from tandem_client.reading import read_fields


def model_info_of(reply: pb.GetModelInfoResponse) -> ModelInfo:
    return read_fields(ModelInfo, reply, eos_token_ids=tuple(reply.eos_token_ids))


def cluster_status_of(reply: admin_pb2.GetClusterStatusResponse) -> ClusterStatus:
    workers = tuple(read_fields(WorkerStatus, worker) for worker in reply.workers)
    return read_fields(ClusterStatus, reply, workers=workers)


def kv_decisions_of(reply: admin_pb2.AdminListKvDecisionsResponse) -> list[KvDecision]:
    return [
        KvDecision(
            prefill_worker=worker.worker_id,
            peer=one.peer,
            transfer_id=one.transfer_id,
            age_s=one.age_s,
            profile=one.profile,
            reason=one.reason,
            quality_floor=one.quality_floor,
            tenant=one.tenant,
            num_tokens=one.num_tokens,
            raw_bytes=one.raw_bytes,
            goodput_bytes_per_s=one.goodput_bytes_per_s,
            predicted_s=one.predicted_s if one.HasField("predicted_s") else None,
            observed_s=one.outcome.observed_s if one.HasField("outcome") else None,
            wire_bytes=one.outcome.payload_bytes,
            failure=one.outcome.failure,
            details=json.loads(one.json) if one.json else {},
        )
        for worker in reply.workers
        for one in worker.decisions
    ]


def route_decisions_of(reply: admin_pb2.ExplainRequestResponse) -> list[RouteDecision]:
    return [
        read_fields(
            RouteDecision,
            one,
            winner=_candidate(one.winner),
            candidates=tuple(_candidate(candidate) for candidate in one.candidates),
            outcome=read_fields(RouteOutcome, one.outcome) if one.HasField("outcome") else None,
        )
        for one in reply.decisions
    ]


def _candidate(message: admin_pb2.RouteCandidate) -> RouteCandidate:
    return read_fields(RouteCandidate, message, terms_s=dict(message.terms_s))
