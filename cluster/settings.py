"""Configuration models made of other packages' models, less the fields that the cluster fills in itself.

A worker's configuration holds the model, the transfer settings and its address; in the cluster's YAML those stand once
at the top, or are the launcher's to choose. Deriving the section instead of copying its fields keeps one definition,
one set of defaults and one description of each key.
"""

from collections.abc import Collection
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import create_model

from core.config import ConfigModel

M = TypeVar("M", bound=ConfigModel)


def section(
    name: str, module: str, base: type[ConfigModel], source: type[ConfigModel], *, filled: Collection[str]
) -> Any:
    """Return a model with the fields of `base`, then those of `source` but for `filled`.

    It must be bound to `name` in `module`, so that instances can be pickled.
    `Any`, because no static type can describe it; `complete` turns an instance back into a `source`.
    """
    fields: dict[str, Any] = {
        field_name: (field.annotation, copy(field))
        for field_name, field in source.model_fields.items()
        if field_name not in filled
    }
    return create_model(name, __base__=base, __doc__=base.__doc__, __module__=module, **fields)


def complete(source: type[M], given: ConfigModel, **filled: object) -> M:
    """Return a `source` from a section and the fields that it lacks. Fields of the section's base are left out.

    Raises:
        pydantic.ValidationError: the whole is inconsistent (a validator of `source` that spans several fields).
    """
    names = set(source.model_fields) & set(type(given).model_fields)
    return source.model_validate({name: getattr(given, name) for name in names} | filled)


def rooted(model: M, folder: Path) -> M:
    """Return the same settings with every relative path in them taken from `folder`. Pure."""
    return model.model_copy(
        update={name: _rooted_value(getattr(model, name), folder) for name in type(model).model_fields}
    )


def _rooted_value(value: object, folder: Path) -> object:
    match value:
        case Path():
            return folder / value.expanduser()
        case ConfigModel():
            return rooted(value, folder)
        case tuple():
            return tuple(_rooted_value(one, folder) for one in value)
        case _:
            return value
