"""Metrics of resumable streams."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class ResumeMetrics:
    """Of one gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._streams = Gauge(
            "tandem_gateway_resumable_streams", "Streams kept for clients that may come back.", registry=registry
        )
        self._bytes = Gauge("tandem_gateway_resumable_bytes", "Of their events.", registry=registry)
        self._begun = Counter("tandem_gateway_resumable_begun", "Streams that were begun.", registry=registry)
        self._resumed = Counter(
            "tandem_gateway_resumed", "Streams that were read on.", ["where"], registry=registry
        )  # here: its own; elsewhere: another gateway's
        self._forgotten = Counter(
            "tandem_gateway_resumable_forgotten", "Streams that are kept no longer.", ["cause"], registry=registry
        )
        self._unread = Counter(
            "tandem_gateway_resumable_unread", "Requests that were ended: nobody read them on.", registry=registry
        )
        self._mirror_failures = Counter(
            "tandem_gateway_resume_mirror_failures", "Writes that the store did not take.", registry=registry
        )

    def kept(self, num_streams: int, num_bytes: int) -> None:
        self._streams.set(num_streams)
        self._bytes.set(num_bytes)

    def begun(self) -> None:
        self._begun.inc()

    def resumed(self, *, is_own: bool) -> None:
        self._resumed.labels("here" if is_own else "elsewhere").inc()

    def forgotten(self, cause: str) -> None:
        self._forgotten.labels(cause).inc()

    def unread(self) -> None:
        self._unread.inc()

    def mirror_failed(self) -> None:
        self._mirror_failures.inc()
