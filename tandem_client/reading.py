"""Wire messages to dataclasses of the same field names. Pure."""

from dataclasses import fields
from typing import TypeVar

from google.protobuf.message import Message

T = TypeVar("T")


def read_fields(kind: type[T], message: Message, **others: object) -> T:
    """Copy the fields that `kind` knows, which have the message's names; a newer gateway may send more."""
    names = [one.name for one in fields(kind) if one.name not in others]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **others)
