"""News to bytes and back. Pure."""

from google.protobuf.message import DecodeError

from core.errors import ProtocolError
from core.ids import Epoch, GatewayId, WorkerId
from protos import replica_pb2 as pb
from protos.codec import load_from_wire, load_to_wire
from router.replicas.news import AbortAnswer, AbortAsk, BindingNews, BreakerNews, CreditNews, News


def news_to_bytes(news: News) -> bytes:
    """Encode."""
    return pb.ReplicaNews(
        gateway_id=news.gateway_id,
        sequence=news.sequence,
        is_whole=news.is_whole,
        credits=[
            pb.WorkerCredit(
                worker_id=one.worker_id,
                epoch=one.epoch,
                num_requests=one.num_requests,
                prefill_tokens=one.prefill_tokens,
                context_tokens=one.context_tokens,
                prefill_s=one.prefill_s,
                load=None if one.load is None else load_to_wire(one.load),
            )
            for one in news.credits
        ],
        bindings=[
            pb.SessionBinding(
                session_id=one.session_id,
                prefill_worker=one.prefill or "",
                decode_worker=one.decode or "",
                expires_in_s=one.expires_in_s,
            )
            for one in news.bindings
        ],
        breakers=[
            pb.BreakerNews(worker_id=one.worker_id, epoch=one.epoch, state=one.state, open_for_s=one.open_for_s)
            for one in news.breakers
        ],
        is_leaving=news.is_leaving,
        aborts_asked=[
            pb.AbortAsked(ask_id=one.ask_id, request_id=one.request_id, tenant=one.tenant) for one in news.aborts_asked
        ],
        aborts_answered=[pb.AbortAnswered(ask_id=one.ask_id, found=one.found) for one in news.aborts_answered],
    ).SerializeToString()


def news_from_bytes(data: bytes) -> News:
    """Decode.

    Raises:
        ProtocolError: these bytes are no news.
    """
    try:
        wire = pb.ReplicaNews.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"no news of a gateway: {error}") from error
    if not wire.gateway_id or not wire.sequence:
        raise ProtocolError("news of no gateway, or without a number")
    return News(
        gateway_id=GatewayId(wire.gateway_id),
        sequence=wire.sequence,
        is_whole=wire.is_whole,
        credits=tuple(
            CreditNews(
                WorkerId(one.worker_id),
                Epoch(one.epoch),
                one.num_requests,
                one.prefill_tokens,
                one.context_tokens,
                one.prefill_s,
                load_from_wire(one.load) if one.HasField("load") else None,
            )
            for one in wire.credits
        ),
        bindings=tuple(
            BindingNews(
                one.session_id,
                WorkerId(one.prefill_worker) if one.prefill_worker else None,
                WorkerId(one.decode_worker) if one.decode_worker else None,
                one.expires_in_s,
            )
            for one in wire.bindings
        ),
        breakers=tuple(
            BreakerNews(WorkerId(one.worker_id), Epoch(one.epoch), one.state, one.open_for_s) for one in wire.breakers
        ),
        is_leaving=wire.is_leaving,
        aborts_asked=tuple(AbortAsk(one.ask_id, one.request_id, one.tenant) for one in wire.aborts_asked),
        aborts_answered=tuple(AbortAnswer(one.ask_id, one.found) for one in wire.aborts_answered),
    )
