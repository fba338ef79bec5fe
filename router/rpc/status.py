"""The gateway's facts as wire messages. Pure reading."""

from protos import admin_pb2
from protos import inference_pb2 as pb
from router.front import Front


def model_info(front: Front) -> pb.GetModelInfoResponse:
    """Weights, dtype and block size come from a ready worker and stay empty without one."""
    record = front.any_record()
    return pb.GetModelInfoResponse(
        model=front.config.model_name,
        weights_version=record.weights_version if record else "",
        dtype=record.dtype if record else "",
        vocab_size=front.facts.vocab_size,
        max_model_len=front.max_model_len(),
        block_size=record.block_size if record else 0,
        eos_token_ids=front.facts.eos_token_ids,
        has_chat_template=front.tokenizer.has_chat_template,
    )


def cluster_status(front: Front) -> admin_pb2.GetClusterStatusResponse:
    """Workers in order of role and name."""
    workers = []
    for record in sorted(front.fleet.records.values(), key=lambda one: (one.role, one.worker_id)):
        row = front.fleet.table.row(record.worker_id)
        assert row is not None, "every record has a row"
        load = row.load
        workers.append(
            admin_pb2.WorkerStatus(
                worker_id=record.worker_id,
                role=record.role,
                epoch=record.epoch,
                state=record.state,
                detail=record.detail,
                address=record.address,
                pid=record.pid,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                queued_prefill_tokens=load.queued_prefill_tokens,
                free_blocks=load.free_blocks,
                total_blocks=load.total_blocks,
                cached_blocks=load.cached_blocks,
                connected=row.connected_epoch == record.epoch,
                in_flight=front.dispatcher.num_on_worker(record.worker_id),
                metrics_port=record.metrics_port,
            )
        )
    return admin_pb2.GetClusterStatusResponse(
        cluster=front.cluster,
        model=front.config.model_name,
        gateway_id=front.gateway_id,
        store_staleness_s=front.fleet.staleness_s,
        queued_requests=front.dispatcher.num_queued,
        active_requests=front.dispatcher.num_active,
        workers=workers,
    )
