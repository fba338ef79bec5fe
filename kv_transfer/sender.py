"""The prefill worker's end of all its KV transfers (signatures; the body follows)."""

from core.clock import Clock
from core.ids import RequestId, TransferId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer.config import KvTransferConfig
from kv_transfer.ports import KvReader, Peer, SenderOutcomes


class KvSender:
    """One per prefill worker; owns one control stream, one link and one sender thread per decode peer, lazily."""

    def __init__(
        self,
        config: KvTransferConfig,
        identity: WorkerIdentity,
        layout: KvLayout,
        reader: KvReader,
        outcomes: SenderOutcomes,
        clock: Clock,
    ) -> None:
        raise NotImplementedError

    async def offer(self, transfer_id: TransferId, request_id: RequestId, num_tokens: int, peer: Peer) -> None:
        raise NotImplementedError

    def push(self, transfer_id: TransferId, layers: range, tokens: range) -> None:
        raise NotImplementedError

    def commit(self, transfer_id: TransferId, first_token_id: int) -> None:
        raise NotImplementedError

    async def abort(self, transfer_id: TransferId, reason: str) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
