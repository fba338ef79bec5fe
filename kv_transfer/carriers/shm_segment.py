"""Memory that two processes share: slots in an anonymous file that has no name and dies with its last owner.

The file is sealed against any change of its size, so that neither side can make the other one's mapping end before its
slots do: a read past the end of a mapped file kills the process that reads. Whoever maps a segment from another process
checks the seals first.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass

import torch

from kv_transfer.link import LinkError, Slot

_PAGE = mmap.PAGESIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_SEGMENT_BYTES = 64 << 30


@dataclass(frozen=True, slots=True)
class Segment:
    """The slots. Their memory is mapped for as long as one of their tensors lives."""

    slots: tuple[Slot, ...]


def create_segment(num_slots: int, slot_bytes: int) -> tuple[Segment, int]:
    """Return a new segment and its descriptor, which the caller closes when the other side has it.

    Raises:
        LinkError: the system has no memory for it, or no such files.
    """
    try:
        descriptor = os.memfd_create("tandem-kv-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            size = num_slots * _stride(slot_bytes)
            os.posix_fallocate(descriptor, 0, size)  # memory that is missing is an error here, not a signal later
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return Segment(_map(descriptor, num_slots, slot_bytes)), descriptor
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise LinkError(f"no shared memory of {num_slots} slots of {slot_bytes} bytes: {error}") from error


def map_segment(descriptor: int, num_slots: int, slot_bytes: int) -> Segment:
    """Map the segment of another process. The descriptor may be closed afterwards.

    Raises:
        LinkError: it is not a sealed file of exactly this size.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        size = os.fstat(descriptor).st_size
        if seals & _SEALS != _SEALS or num_slots < 1 or size != num_slots * _stride(slot_bytes):
            raise LinkError(f"what came is not a sealed segment of {num_slots} slots of {slot_bytes} bytes")
        if size > _MAX_SEGMENT_BYTES:
            raise LinkError(f"a segment of {size} bytes")
        return Segment(_map(descriptor, num_slots, slot_bytes))
    except OSError as error:  # not a file that can be sealed, or not one that can be mapped
        raise LinkError(f"shared memory cannot be mapped: {error}") from error


def _stride(slot_bytes: int) -> int:
    return -(-slot_bytes // _PAGE) * _PAGE


def _map(descriptor: int, num_slots: int, slot_bytes: int) -> tuple[Slot, ...]:
    stride = _stride(slot_bytes)
    # Populated now, so that no page fault falls into a transfer.
    mapping = mmap.mmap(descriptor, num_slots * stride, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping alive, and so do its slices
    return tuple(Slot(i, whole[i * stride : i * stride + slot_bytes]) for i in range(num_slots))
