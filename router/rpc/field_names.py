"""Offending fields by their paths in the gRPC messages, where other layers know them by shorter names. Pure."""

import contextlib
from collections.abc import Iterator

from core.errors import InvalidRequest

_OF_TERMS = frozenset(
    {"handoff_budget_s", "kv_quality", "priority", "resume_window_s", "service_class", "session_id", "tenant"}
)


@contextlib.contextmanager
def message_paths() -> Iterator[None]:
    """Raises: InvalidRequest, as it is raised inside, with paths in `GenerateRequest` or `ChatRequest`."""
    try:
        yield
    except InvalidRequest as error:
        (field, problem), *others = [(_path(name), what) for name, what in error.violations]
        raise type(error)(field, problem, others=tuple(others)) from error


def _path(name: str) -> str:
    return f"terms.{name}" if name in _OF_TERMS or name.startswith("slo.") else name
