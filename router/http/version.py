"""Which Tandem this is."""

import functools
import importlib.metadata

_UNPACKAGED = "0.0.0"  # run from a checkout that was never installed


@functools.cache
def tandem_version() -> str:
    """Return the version of the installed package."""
    try:
        return importlib.metadata.version("tandem")
    except importlib.metadata.PackageNotFoundError:
        return _UNPACKAGED
