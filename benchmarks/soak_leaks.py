"""What the soak looks for when everything should be quiet: anything that is still held by anybody.

The only part that looks inside senders and receivers: ownership is theirs, and no port tells it.
"""

import gc
import os
import threading
import time
from collections.abc import Sequence

from benchmarks.soak_fleet import DecodeSide, PrefillSide

SETTLE_S = 15.0


def leaks(prefill: Sequence[PrefillSide], decode: Sequence[DecodeSide]) -> list[str]:
    """Return what is held, in words; empty when nothing is."""
    found: list[str] = []
    for source in prefill:
        sender = source.sender
        pumps = [pair.pump for pair in sender._pairs.values()]
        found += _some(len(sender._transfers), "transfers of a sender")
        found += _some(len(source.chooser.pending), "profiles that were chosen and not observed")
        found += _some(sum(len(pump._queue) + len(pump._line.transfers()) for pump in pumps), "parts in pumps")
        found += _some(sender._parts.buffers.lent_bytes, "staging bytes of a sender")
        # one slot may be kept at hand by the pump
        found += _some(sum(end.num_lent > 1 for end in source.links.open_ends()), "sending ends with slots lent")
    for target in decode:
        receiver = target.receiver
        found += _some(len(receiver._transfers), "transfers of a receiver")
        found += _some(sum(len(pair.landings) for pair in receiver._streams.pairs), "landings")
        found += _some(receiver._parts.buffers.lent_bytes, "staging bytes of a receiver")
        found += _some(sum(end.num_lent > 0 for end in target.links.open_ends()), "receiving ends with slots lent")
    return found + _lost_credit(prefill, decode)


def _some(count: int, what: str) -> list[str]:
    return [f"{count} {what}"] if count else []


def _lost_credit(prefill: Sequence[PrefillSide], decode: Sequence[DecodeSide]) -> list[str]:
    """Credit is conserved where no message that carries it was touched: balance + consumed >= window."""
    found = []
    for source in prefill:
        if source.links.has_lied or not all(stream.is_credit_known for stream in source.dialer.streams):
            continue
        for name, pair in source.sender._pairs.items():
            target = next(side for side in decode if side.peer.worker_id == name)
            mine = source.sender._parts.identity.worker_id
            far = next((far for far in target.receiver._streams.pairs if far.sender_id == mine), None)
            near = pair.pump.link
            if far is None or far._pump is None or near._end is None or near.epoch != far._link_epoch:
                continue
            missing = near._window_bytes - near._credit_bytes - far._pump._consumed_bytes
            if near._window_bytes and missing > 0:
                found.append(f"{missing} bytes of credit to {name}")
    return found


def held_by_process() -> dict[str, int]:
    """Return what a process can leak that is not its own memory."""
    gc.collect()
    return {
        "threads": sum(thread.name.startswith("kv-") for thread in threading.enumerate()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "files in shared memory": len(os.listdir("/dev/shm")),
    }


def leaked_since(before: dict[str, int]) -> list[str]:
    """Return what the process holds more than before, once threads that were told to end have ended."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = held_by_process()
        more = [f"{after[kind] - before[kind]} {kind} leaked" for kind in after if after[kind] > before[kind]]
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.05)
