"""Runs a kernel on the threads that torch already has.

torch's CPU operators run on an OpenMP team of libgomp, whose threads stay hot (they spin) for a while after each
operator. A second pool, numba's own, would fight these for the cores. So a kernel is handed to the very same team:
`GOMP_parallel` is the function that a compiled ``#pragma omp parallel`` calls. Where torch uses another OpenMP
(macOS, Windows) a kernel runs on the calling thread alone.
"""

import ctypes
import struct
from pathlib import Path

import torch

_WORDS = 24
_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_GilHeldEntry = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class Kernel:
    """A compiled entry point that can be called with a list of 64-bit words.

    Concurrency: one call at a time per `Kernel` (the engine thread owns it).
    """

    def __init__(self, address: int, format_: str) -> None:
        """`format_`: a struct letter per word after the counter: ``q`` integers and addresses, ``d`` floats."""
        self._address = ctypes.c_void_p(address)
        self._alone = _GilHeldEntry(address)  # short calls keep the GIL: giving it away costs more than they take
        self._words = ctypes.create_string_buffer(8 * _WORDS)
        self._data = ctypes.c_void_p(ctypes.addressof(self._words))
        self._packer = struct.Struct(f"=q{format_}")
        assert self._packer.size <= 8 * _WORDS

    def run(self, num_threads: int, *words: float) -> None:
        """Run to completion on up to `num_threads` threads of torch's team."""
        self._packer.pack_into(self._words, 0, 0, *words)
        if num_threads > 1 and _PARALLEL is not None:
            _PARALLEL(self._address, self._data, num_threads, 0)
        else:
            self._alone(self._data)


def _find_parallel() -> "ctypes._NamedFuncPointer | None":
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        function = ctypes.CDLL(str(path)).GOMP_parallel
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


_PARALLEL = _find_parallel()
