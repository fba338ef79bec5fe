"""What all pairs of one receiver share. Handed down whole; each level takes what it needs."""

from collections.abc import Mapping
from dataclasses import dataclass

from core.clock import Clock
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer.codec import Decoder
from kv_transfer.codec_threads import Buffers, CodecThreads
from kv_transfer.config import KvTransferConfig
from kv_transfer.link import Links
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import KvWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverParts:
    """Of one receiver."""

    identity: WorkerIdentity
    config: KvTransferConfig
    layout: KvLayout
    links: Links
    writer: KvWriter
    decoders: Mapping[int, Decoder]
    metrics: KvTransferMetrics
    clock: Clock
    threads: CodecThreads
    buffers: Buffers
