"""A file of API keys as `tandem keys --file` changes it. Gateways read it again by themselves."""

import json
import os
from pathlib import Path

import yaml

from core.config import load_config
from core.errors import ConfigError
from router.access.config import ApiKeyConfig, KeysFile


def read_keys(path: Path) -> tuple[ApiKeyConfig, ...]:
    """Return the keys of a file; none if there is no such file.

    Raises:
        ConfigError: it cannot be read.
    """
    return load_config(KeysFile, path).keys if path.exists() else ()


def write_keys(path: Path, keys: tuple[ApiKeyConfig, ...]) -> None:
    """Replace the file, comments included, in one step.

    Raises:
        ConfigError: it cannot be written.
    """
    plain = json.loads(KeysFile(keys=keys).model_dump_json(exclude_none=True))
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot write: {error.strerror}") from error
