"""What KV transfer counts, in the registry that the worker exports."""

from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class KvTransferMetrics:
    """One set per registry. `side` is sender or receiver."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.payload_bytes = Counter(
            "tandem_kv_transfer_bytes", "KV payload that crossed a link (after coding)", ["side"], registry=registry
        )
        self.frames = Counter("tandem_kv_transfer_frames", "Frames that crossed a link", ["side"], registry=registry)
        # Pumps count every frame: the children are looked up once.
        self.frames_sent = self.frames.labels("sender")
        self.payload_sent = self.payload_bytes.labels("sender")
        self.frames_received = self.frames.labels("receiver")
        self.payload_received = self.payload_bytes.labels("receiver")
        self.raw_bytes = Counter(
            "tandem_kv_transfer_raw_bytes", "KV that was handed over (before coding)", ["side"], registry=registry
        )
        self.decisions = Counter(
            "tandem_kv_transfer_profile_decisions",
            "Profiles chosen, by reason",
            ["profile", "reason"],
            registry=registry,
        )
        self.frames_refused = Counter(
            "tandem_kv_transfer_frames_refused", "Frames not written, by reason", ["reason"], registry=registry
        )
        self.frames_late = Counter(
            "tandem_kv_transfer_frames_late", "Frames of ended transfers, drained and dropped", registry=registry
        )
        self.transfers = Counter(
            "tandem_kv_transfer_transfers", "Transfers that ended with an ACK", ["side"], registry=registry
        )
        self.failures = Counter(
            "tandem_kv_transfer_failures", "Transfers that ended without an ACK", ["side", "reason"], registry=registry
        )
        self.links = Counter("tandem_kv_transfer_links", "Links opened", ["side"], registry=registry)
        self.transfer_seconds = Histogram(
            "tandem_kv_transfer_seconds", "Offer to landed", registry=registry, buckets=_SECONDS
        )
        self.exposed_seconds = Histogram(
            "tandem_kv_transfer_exposed_seconds", "Prefill end to landed", registry=registry, buckets=_SECONDS
        )
        # The receiver's measurement again, so that a prefill worker's own metrics tell what its links cost.
        self.acked_exposed_seconds = Histogram(
            "tandem_kv_transfer_acked_exposed_seconds",
            "Prefill end to landed, as acknowledged to the sender",
            registry=registry,
            buckets=_SECONDS,
        )


@cache
def process_metrics() -> KvTransferMetrics:
    """Return the metrics in the process's default registry, registered on first use."""
    return KvTransferMetrics()
