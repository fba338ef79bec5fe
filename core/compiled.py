"""Compiles loops over arrays, one way for all: without the interpreter lock, kept on disk from run to run.

What is kept holds until a source file in the folder of the function changes, or this one. Numba itself looks at the
function's own file only, and would go on with what other files said before: so compiled code may call compiled code,
and use constants, of its own folder and of no other.

The first call takes seconds where no cache can be kept, so what serves makes it before it says that it is ready.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba import njit
from numba.core import caching

P = ParamSpec("P")
R = TypeVar("R")
_CONFIG: Any = numba.config
_INNER: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


@cache
def _stamp(folder: Path) -> bytes:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def _of_folder(locator: Any) -> Any:
    """Return Numba's locator of a cache with a stamp of the whole folder."""

    class OfFolder(locator):  # type: ignore[misc]
        def get_source_stamp(self) -> bytes:
            return _stamp(Path(self._py_file).parent)

    return OfFolder


Configured = _of_folder(caching.UserProvidedCacheLocator)
BesideSource = _of_folder(caching.InTreeCacheLocator)
OfUser = _of_folder(caching.UserWideCacheLocator)
_LOCATORS = ",".join(f"{__name__}.{name}" for name in ("Configured", "BesideSource", "OfUser"))


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function when it is called first, and keep the outcome on disk if there is a place for it."""
    locators, _CONFIG.CACHE_LOCATOR_CLASSES = _CONFIG.CACHE_LOCATOR_CLASSES, _LOCATORS  # read while it is decorated
    try:
        return cast("Callable[P, R]", njit(nogil=True, cache=True, error_model="numpy")(function))
    except RuntimeError:  # none of the places can be written to: a read-only image; every process compiles for itself
        return cast("Callable[P, R]", njit(nogil=True, error_model="numpy")(function))
    finally:
        _CONFIG.CACHE_LOCATOR_CLASSES = locators


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function that only compiled ones of its folder call: no way in from Python, nothing kept by itself."""
    return cast("Callable[P, R]", njit(**_INNER)(function))
