"""What a person sees while the cluster comes up and lives: one line per service, or one line per change."""

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.supervision.lifecycle import LifeState
from cluster.supervision.supervisor import ServiceStatus

_STYLES = {
    LifeState.READY: "green",
    LifeState.FAILED: "red",
    LifeState.BACKING_OFF: "red",
    LifeState.STARTING: "yellow",
    LifeState.DRAINING: "cyan",
}


class Progress(Protocol):
    """Told of everything that changes; never raises, never waits."""

    def phase(self, text: str) -> None:
        """The launcher begins something that is no service: joining Ray, reserving places."""
        ...

    def service(self, status: ServiceStatus) -> None:
        """A service changed its state."""
        ...

    def detail(self, name: str, text: str) -> None:
        """A service tells what it is doing: "loading weights 60 %"."""
        ...


class LineProgress:
    """One plain line per change, for logs, pipes and tests. Starts are told once, not for every step."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._told: dict[str, str] = {}

    def phase(self, text: str) -> None:
        self._write(text)

    def service(self, status: ServiceStatus) -> None:
        if status.state in (LifeState.PENDING, LifeState.STOPPED, LifeState.FAILED):
            return  # on the way to what is told
        self._tell(status.name, describe(status))

    def detail(self, name: str, text: str) -> None:
        self._tell(name, text)

    def _tell(self, name: str, text: str) -> None:
        if self._told.get(name) != text:
            self._told[name] = text
            self._write(f"{name}: {text}")


class LiveProgress:
    """A table that changes in place. Context manager."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._phase = ""
        self._statuses: dict[str, ServiceStatus] = {}
        self._details: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def phase(self, text: str) -> None:
        self._phase = text
        self._show()

    def service(self, status: ServiceStatus) -> None:
        self._statuses[status.name] = status
        if status.state is not LifeState.STARTING:
            self._details.pop(status.name, None)
        self._show()

    def detail(self, name: str, text: str) -> None:
        self._details[name] = text
        self._show()

    def _show(self) -> None:
        table = Table.grid(padding=(0, 2))
        for name, status in self._statuses.items():
            text = describe(status)
            if status.state is LifeState.STARTING and name in self._details:
                text = self._details[name]
            table.add_row(name, Text(status.state, style=_STYLES.get(status.state, "")), text)
        if self._phase:
            table.add_row("", "", Text(self._phase, style="dim"))
        self._live.update(table)


def describe(status: ServiceStatus) -> str:
    """Say in one line how a service is. Pure."""
    match status.state:
        case LifeState.READY:
            return f"ready at {status.address} (pid {status.pid}, epoch {status.epoch})"
        case LifeState.FAILED | LifeState.BACKING_OFF:
            loop = f"crash loop, {status.failures} failures in a row: " if status.is_crash_loop else "failed: "
            return f"{loop}{status.cause}"
        case LifeState.STARTING:
            return "restarting" if status.restarts else "starting"
        case LifeState.DRAINING:
            return "finishing what it has"
        case LifeState.PENDING | LifeState.STOPPED:
            return ""
