"""Which Tandem this is, and on what it computes."""

import functools
import importlib.metadata

_UNPACKAGED = "0.0.0"  # run from a checkout that was never installed


@functools.cache
def tandem_version() -> str:
    """Return the version of the installed package."""
    return _version("tandem") or _UNPACKAGED


@functools.cache
def engine_version() -> str:
    """Return what generates tokens here: equal versions, weights and seeds give equal tokens on equal hardware."""
    torch = _version("torch")
    return f"tandem-{tandem_version()}" + (f"/torch-{torch}" if torch else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
