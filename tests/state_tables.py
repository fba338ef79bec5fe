"""What tests ask of every machine that is a table of states and edges."""

from collections.abc import Mapping
from typing import Any, TypeVar

S = TypeVar("S")


def reach(edges: Mapping[S, Mapping[Any, S]], *starts: S) -> set[S]:
    """Return every state that some events lead to from `starts`, these included. Pure."""
    reached = set(starts)
    while more := {after for state in reached for after in edges[state].values()} - reached:
        reached |= more
    return reached
