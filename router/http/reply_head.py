"""What every reply and every chunk of one call begins with."""

import hashlib
from dataclasses import dataclass
from typing import Any

from router.generation.provenance import Provenance


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """The same in all chunks. `created`: Unix time in seconds."""

    id: str
    created: int
    model: str
    fingerprint: str

    def told(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def fingerprint(provenance: Provenance) -> str:
    """Equal fingerprints and equal seeds give equal answers, but for rounding: of the weights, their dtype and the
    engine. Pure."""
    parts = (provenance.weights_version, provenance.dtype, provenance.engine_version)
    return "fp_" + hashlib.blake2b("\0".join(parts).encode(), digest_size=5).hexdigest()
