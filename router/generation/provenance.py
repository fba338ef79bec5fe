"""What computed an answer."""

from dataclasses import dataclass

from core.membership import WorkerRecord


@dataclass(frozen=True, slots=True)
class Provenance:
    """What all workers of one model agree on; empty while no worker is known."""

    weights_version: str = ""
    dtype: str = ""
    engine_version: str = ""

    @classmethod
    def of(cls, record: WorkerRecord | None) -> "Provenance":
        """Return what a worker's record says of its engine."""
        return cls() if record is None else cls(record.weights_version, record.dtype, record.engine_version)
