"""How `status`, `generate` and `down` find a running cluster: one JSON file per cluster name, in the user's run folder.

The launcher holds a lock on it for as long as it lives, so two of one name cannot start; the file tells the launcher's
pid with its start time, because process numbers are used again.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.credentials import NO_CREDENTIALS, Credentials
from cluster.workspace import is_alive
from core.errors import ConfigError
from core.tls import ClientTls


class RunRecord(BaseModel):
    """A launcher and what it launched. `http`: base addresses of OpenAI's API; `mark` is that of `cluster.workspace`;
    `is_ready` once requests are served."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    cluster: str
    pid: int
    created_s: float
    gateway: str
    http: str = ""
    mark: str
    config: str = ""
    is_ready: bool = False
    api_key: str = Field("", repr=False)
    tls: ClientTls | None = None

    @classmethod
    def of_this_process(
        cls, cluster: str, gateway: str, http: str, mark: str, config: str, credentials: Credentials = NO_CREDENTIALS
    ) -> Self:
        created_s = psutil.Process().create_time()
        return cls(
            cluster=cluster,
            pid=os.getpid(),
            created_s=created_s,
            gateway=gateway,
            http=http,
            mark=mark,
            config=config,
            api_key=credentials.api_key,
            tls=credentials.tls,
        )

    @property
    def is_alive(self) -> bool:
        return is_alive(self.pid, self.created_s)


def run_folder() -> Path:
    """Return $XDG_RUNTIME_DIR/tandem, or else $XDG_STATE_HOME/tandem (~/.local/state/tandem)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("XDG_RUNTIME_DIR") or state) / "tandem"


class RunFile:
    """The file while its launcher holds it."""

    def __init__(self, path: Path, handle: IO[str]) -> None:
        self._path = path
        self._handle = handle

    def write(self, record: RunRecord) -> None:
        """Replace the content. Readers see the old or the new one: the file is far smaller than a page."""
        text = record.model_dump_json(indent=2) + "\n"
        self._handle.seek(0)
        self._handle.write(text)
        self._handle.truncate()
        self._handle.flush()


@contextlib.contextmanager
def claim(cluster: str) -> Iterator[RunFile]:
    """Hold the name `cluster` on this machine, for this user; the file goes in the end.

    Raises:
        ConfigError: a living launcher holds it, or the folder cannot be written.
    """
    path = _path(cluster)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"cluster {cluster!r} is up already; see `tandem status`, `tandem down`") from None
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(handle.fileno())):
            raise ConfigError(f"cluster {cluster!r} was going down just now; try again")  # we locked a removed file
        try:
            yield RunFile(path, handle)
        finally:
            path.unlink(missing_ok=True)


def find(cluster: str | None) -> RunRecord:
    """Return the record of a living launcher: of `cluster`, or the only one there is.

    Raises:
        ConfigError: there is none, or several and no name.
    """
    paths = sorted(run_folder().glob("*.json")) if cluster is None else [_path(cluster)]
    alive = [record for path in paths if (record := read(path)) is not None and record.is_alive]
    if not alive:
        what = "no cluster is up" if cluster is None else f"cluster {cluster!r} is not up"
        raise ConfigError(f"{what} on this machine; start one with `tandem up -f cluster.yaml`")
    if len(alive) > 1:
        names = ", ".join(record.cluster for record in alive)
        raise ConfigError(f"several clusters are up ({names}); say which with --cluster")
    return alive[0]


def read(path: Path) -> RunRecord | None:
    """Return what the file says; None when there is none or it cannot be read (a launcher in its first moments)."""
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def _path(cluster: str) -> Path:
    return run_folder() / f"{cluster}.json"
