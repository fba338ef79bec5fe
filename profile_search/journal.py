"""The journal of a search: every measurement as one line, appended as it is made. A killed search goes on from it.

The first line says what the measurements hold for; a journal of other weights, codecs, prompts or another machine is
refused. A last line that was cut off by the kill is dropped. Knows nothing of what is measured.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError


class Journal:
    """Append-only rows of JSON.

    Attributes:
        rows: those that were there when it was opened, without the first.
    """

    def __init__(self, path: Path, holds_for: Mapping[str, Any]) -> None:
        """Open or begin the file.

        Raises:
            ConfigError: it holds for something else.
        """
        self._path = path
        self.rows: list[dict[str, Any]] = []
        kept = list(_whole_rows(path)) if path.exists() else []
        if kept and kept[0] != dict(holds_for):
            differing = sorted(key for key in holds_for if kept[0].get(key) != holds_for[key])
            raise ConfigError(
                f"{path}: this is the journal of another search (other {', '.join(differing) or 'keys'}); "
                "remove it, or write elsewhere"
            )
        self.rows = kept[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in (dict(holds_for), *self.rows))
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is in the file when this returns."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
