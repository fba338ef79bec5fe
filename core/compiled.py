"""Compiles loops over arrays, one way for all: without the interpreter lock, kept on disk from run to run.

The first call takes seconds where no cache can be kept, so what serves makes it before it says that it is ready.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")
_INNER: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function when it is called first, and keep the outcome on disk if there is a place for it."""
    try:
        return cast("Callable[P, R]", njit(nogil=True, cache=True, error_model="numpy")(function))
    except RuntimeError:  # none of the places can be written to: a read-only image; every process compiles for itself
        return cast("Callable[P, R]", njit(nogil=True, error_model="numpy")(function))


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function that only compiled ones of its file call: no way in from Python, nothing kept by itself."""
    return cast("Callable[P, R]", njit(**_INNER)(function))
