"""The decode worker's end of all its KV transfers (signatures; the body follows)."""

import grpc

from core.clock import Clock
from core.ids import RequestId, TransferId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer.config import KvTransferConfig
from kv_transfer.ports import KvWriter, ReceiverOutcomes


class KvReceiver:
    """One per decode worker; hosts the rendezvous store; owns one link and one receiver thread per prefill peer."""

    def __init__(
        self,
        config: KvTransferConfig,
        identity: WorkerIdentity,
        layout: KvLayout,
        writer: KvWriter,
        outcomes: ReceiverOutcomes,
        clock: Clock,
    ) -> None:
        raise NotImplementedError

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the KvTransfer service; before the server starts."""
        raise NotImplementedError

    async def expect(
        self,
        transfer_id: TransferId,
        request_id: RequestId,
        held_tokens: int,
        num_tokens: int,
        lease_s: float | None = None,
    ) -> None:
        raise NotImplementedError

    async def cancel(self, transfer_id: TransferId, reason: str) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
