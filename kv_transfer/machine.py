"""Which machine this is: what a measured codec time holds for.

Owns one word, the fingerprint. Two machines of equal fingerprint code equally fast; nothing else is promised by it.
"""

import os
import platform
from functools import cache
from hashlib import blake2b
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_MODEL_KEYS = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part", "flags", "Features")


@cache
def machine_fingerprint() -> str:
    """Return `<processor>/<cores>/<digest>`: readable, and different for other instruction sets or core counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return fingerprint_of(_cpuinfo(), cores)


def fingerprint_of(cpuinfo: str, cores: int) -> str:
    """Pure. `cpuinfo` is the text that Linux gives; of it, the first processor counts."""
    first = cpuinfo.split("\n\n", 1)[0]
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name") or facts.get("CPU part") or platform.machine()
    named = repr([facts.get(key, "") for key in _MODEL_KEYS])
    return f"{name}/{cores}/{blake2b(named.encode(), digest_size=4).hexdigest()}"


def _cpuinfo() -> str:
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # not Linux: the platform's own word has to do
        return f"model name: {platform.processor() or platform.machine()}"
