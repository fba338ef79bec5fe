"""What all pairs of one sender share. Handed down whole; each level takes what it needs."""

from dataclasses import dataclass

from core.clock import Clock
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer.codec_threads import Buffers, CodecThreads
from kv_transfer.config import KvTransferConfig
from kv_transfer.link import Links
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import KvReader, TokenReader
from kv_transfer.sender.link_quota import LinkQuota


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderParts:
    """Of one sender. `tokens` is None where no token is ever left out."""

    identity: WorkerIdentity
    config: KvTransferConfig
    layout: KvLayout
    links: Links
    reader: KvReader
    tokens: TokenReader | None
    metrics: KvTransferMetrics
    clock: Clock
    threads: CodecThreads
    buffers: Buffers
    quota: LinkQuota
