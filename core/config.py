"""Base of every configuration model, and the one way to read one from YAML.

An unknown key, a wrong type or a value out of range is a `ConfigError` that names the dotted path. No environment
variable is read here: only secrets and addresses may come from the environment, where they are used.
"""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from core.errors import ConfigError


class ConfigModel(BaseModel):
    """Frozen, strict about keys. Compose; do not inherit one configuration from another."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)


def parse_config(model: type[M], data: object, *, source: str) -> M:
    """Validate plain data. Pure.

    Raises:
        ConfigError: one line: source, dotted path and problem of the first error, and how many more there are.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, source)) from error


def load_config(model: type[M], path: Path) -> M:
    """Read and validate a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not validate.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    return parse_config(model, {} if data is None else data, source=str(path))


def _first_problem(error: ValidationError, source: str) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    dotted = ".".join(str(part) for part in first["loc"]) or "(top level)"
    message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{source}: {dotted}: {message}{more}"
