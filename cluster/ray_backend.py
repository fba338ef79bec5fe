"""Processes as Ray actors. The only importer of `ray`.

A private Ray cluster on this machine (the default), or an existing one. One placement group per pool reserves CPUs and
GPUs, bundle i for worker i, so that a restarted worker comes back to its own reservation. Ray carries the life cycle
only: no request, token or KV byte ever passes through it.

Death is noticed through the actor's long-running `run` call, which breaks within milliseconds of its process. When the
launcher itself dies, its private cluster dies with it (Ray ties its daemons to the thread that called `connect`; it
must live as long as the launcher), and an existing cluster removes the actors of a lost driver.
"""

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.util
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.config import RayConfig
from cluster.service_host import Factory, Seat, ServiceHost, Started, Whereabouts
from cluster.supervision.incarnation import SpawnError
from core.errors import ConfigError

_log = logging.getLogger(__name__)
_HELLO_S = 60.0  # a process of Python, on a busy machine
_GONE_S = 5.0
_VITAL = ("gcs_server", "raylet")


@dataclass(frozen=True, slots=True)
class RayNodes:
    """What the Ray cluster has."""

    num_nodes: int
    cpus: float
    gpus: float


class RayBackend:
    """One connection to one Ray cluster. Blocking methods are called in a thread that outlives the backend."""

    def __init__(self, nodes: RayNodes, restore: Mapping[str, str | None]) -> None:
        self.nodes = nodes
        self._restore = restore
        self._groups: dict[str, PlacementGroup] = {}

    @classmethod
    def connect(
        cls, config: RayConfig, *, namespace: str, packages: Path, names: Sequence[str], temp: Path
    ) -> "RayBackend":
        """Start or join. Blocking.

        Args:
            packages, names: folder of our root packages, and their names; made importable in the actors.
            temp: folder for a private cluster's sockets and logs; its path must be short.

        Raises:
            ConfigError: the address does not answer, or Ray cannot work here.
        """
        restore = _set_environment(packages, is_private=config.address is None)
        logging.getLogger("ray").setLevel(logging.ERROR)  # its own `logging_level` comes too late for some
        quiet: dict[str, Any] = {
            "namespace": namespace, "log_to_driver": False, "configure_logging": False,
            "logging_level": logging.ERROR,
        }  # fmt: skip
        try:
            if config.address is None:
                ray.init(
                    include_dashboard=False, num_cpus=len(os.sched_getaffinity(0)),
                    object_store_memory=config.object_store_bytes, _temp_dir=str(temp), **quiet,
                )  # fmt: skip
            else:
                _check_answers(config.address)
                modules = [str(packages / name) for name in names] if config.ship_code else []
                ray.init(address=config.address, runtime_env={"py_modules": modules} if modules else None, **quiet)
        except ConfigError:
            _restore_environment(restore)
            raise
        except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
            ray.shutdown()
            _restore_environment(restore)
            raise ConfigError(f"ray: cannot {'join' if config.address else 'start'}: {_one_line(error)}") from error
        _silence_raylet()
        resources = ray.cluster_resources()
        alive = sum(1 for node in ray.nodes() if node["Alive"])
        return cls(RayNodes(alive, resources.get("CPU", 0.0), resources.get("GPU", 0.0)), restore)

    @property
    def is_lost(self) -> bool:
        """Whether a daemon of a private cluster has died: no call of Ray's can be trusted to return any more."""
        return _is_lost()

    async def until_lost(self) -> str:
        """Wait for the death of a daemon of a private cluster; return its name. For ever, with an existing cluster."""
        handles: dict[str, int] = {}
        gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def on_death(name: str) -> None:
            if not gone.done():
                gone.set_result(name)

        try:
            for name, daemon in _vital().items():
                try:
                    handles[name] = os.pidfd_open(daemon.pid)  # not collected yet, if dead: it is our child
                except OSError:
                    on_death(name)
                else:
                    loop.add_reader(handles[name], on_death, name)
            return await gone
        finally:
            for handle in handles.values():
                loop.remove_reader(handle)
                os.close(handle)

    def reserve(self, pool: str, bundles: Sequence[Mapping[str, float]], strategy: str, timeout_s: float) -> None:
        """Reserve one bundle per worker of `pool`, all or nothing. Blocking.

        Raises:
            ConfigError: no nodes can hold them within `timeout_s`.
        """
        group = placement_group([dict(bundle) for bundle in bundles], strategy=strategy)
        self._groups[pool] = group
        if not group.wait(timeout_s):
            wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in bundles[0].items())
            raise ConfigError(
                f"{pool}.resources: no place for {len(bundles)} x ({wanted}) with strategy {strategy} "
                f"in the Ray cluster within {timeout_s:g} s"
            )

    async def spawn(
        self, factory: Factory, seat_for: Callable[[Whereabouts], Seat], *, pool: str | None, bundle: int = 0
    ) -> "RayActor":
        """Make an actor process: in its bundle of `pool`, or beside the launcher when None.

        Raises:
            SpawnError: no process came up; nothing is left behind.
        """
        if _is_lost():
            raise SpawnError("its Ray cluster died")
        options: dict[str, Any]
        if pool is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            options = {"num_cpus": 0, "scheduling_strategy": here}
        else:
            group = self._groups[pool]
            reserved = dict(group.bundle_specs[bundle])
            options = {
                "num_cpus": reserved.pop("CPU", 0),
                "num_gpus": reserved.pop("GPU", 0),
                "resources": reserved,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle),
            }
        actor = ray.remote(_Host).options(max_restarts=0, max_concurrency=16, **options).remote(factory)
        try:
            whereabouts = await asyncio.wait_for(actor.hello.remote(), _HELLO_S)
        except TimeoutError:
            ray.kill(actor)
            raise SpawnError(f"no process within {_HELLO_S:g} s; is its node alive?") from None
        except ray.exceptions.RayError as error:
            raise SpawnError(f"no process: {_one_line(error)}") from error
        return RayActor(actor, whereabouts, seat_for(whereabouts))

    def close(self) -> None:
        """Remove the reservations, end a private cluster or leave an existing one. Blocking; idempotent.

        Of a cluster that `is_lost` nothing is asked: its processes are the caller's to kill.
        """
        if self.is_lost:
            _restore_environment(self._restore)
            return
        with contextlib.suppress(ray.exceptions.RayError):
            for group in self._groups.values():
                remove_placement_group(group)
        self._groups.clear()
        daemons = _daemons()
        ray.shutdown()
        for daemon in daemons:  # ended by now; Ray itself never asks how
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(_GONE_S)
        _restore_environment(self._restore)


class _Host(ServiceHost):
    """A service host that knows its Ray node."""

    async def hello(self) -> Whereabouts:
        context = ray.get_runtime_context()
        return replace(await super().hello(), node=context.get_node_id(), address=ray.util.get_node_ip_address())


class RayActor:
    """Implements `cluster.supervision.incarnation.Incarnation`."""

    def __init__(self, actor: Any, whereabouts: Whereabouts, seat: Seat) -> None:
        self._actor = actor
        self._seat = seat
        self._end = actor.run.remote()
        self._handle = _open_handle(whereabouts)
        self.pid = whereabouts.pid
        self.host = whereabouts.host

    async def start(self) -> str:
        try:
            started: Started = await self._actor.start.remote(self._seat)
        except ray.exceptions.RayError as error:
            raise SpawnError(_cause(error)) from error
        if started.problem:
            raise SpawnError(started.problem)
        return started.address

    async def ended(self) -> str:
        try:
            cause = str(await self._end)
        except ray.exceptions.RayError as error:
            cause = _cause(error)
        await self.kill()
        await self._until_gone()
        return cause

    async def stop(self, deadline_s: float) -> None:
        self._actor.stop.remote(deadline_s)  # its outcome shows as the end of `run`

    async def kill(self) -> None:
        if not _is_lost():  # else it would wait for a minute, and the event loop with it
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._actor, no_restart=True)
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    async def _until_gone(self) -> None:
        """Wait until the process of this machine has left the process table, and let go of its handle."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        gone, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(handle, gone.set)
        try:
            await asyncio.wait_for(gone.wait(), _GONE_S)
        except TimeoutError:
            _log.error("process %d does not die of SIGKILL", self.pid)
        finally:
            loop.remove_reader(handle)
            os.close(handle)


def _open_handle(whereabouts: Whereabouts) -> int | None:
    """Return a pidfd of a process on our own node, None elsewhere.

    It kills without the process's cooperation: one that hangs hears nothing of Ray's. Process numbers are used again,
    handles are not.
    """
    if whereabouts.node != ray.get_runtime_context().get_node_id():
        return None
    try:
        return os.pidfd_open(whereabouts.pid)
    except OSError:  # gone already, or a kernel without: Ray's own kill must do
        return None


def _cause(error: ray.exceptions.RayError) -> str:
    """Say in one line why a process or a call ended."""
    if isinstance(error, ray.exceptions.RayTaskError):  # a defect of ours: the traceback is in its message
        _log.error("%s", error)
        return _one_line(error.cause)
    text = str(error)
    if "killed by `ray.kill`" in text:
        return "killed"
    return "its process died (killed, crashed or out of memory)" if "exit type" in text else _one_line(error)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:300]


def _check_answers(address: str) -> None:
    """Look at the port before Ray does: Ray itself tries for minutes, and prints.

    Raises:
        ConfigError: nobody listens there.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise ConfigError(f"ray.address: cannot reach {address}: {error.strerror or error}") from error


@functools.cache
def _token() -> str:
    """One per process, because Ray reads it once per process."""
    return secrets.token_hex(32)


def _set_environment(packages: Path, *, is_private: bool) -> dict[str, str | None]:
    """Set what Ray's processes inherit from ours; returns the former values."""
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    wanted = {
        "PYTHONPATH": path,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # unset, it is a warning
        "RAY_worker_niceness": "0",  # Ray takes its processes for batch work, and yields to all others
    }
    if is_private and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & os.environ.keys():
        # Whoever reaches its ports may run code, so Ray asks for a token by default. This one only our own processes
        # know; left to itself, Ray would keep one in the home folder.
        wanted["RAY_AUTH_TOKEN"] = _token()
    before = {name: os.environ.get(name) for name in (*wanted, "RAY_AUTH_MODE")}  # the last one is set by Ray
    os.environ.update(wanted)
    return before


def _restore_environment(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def reclaim_signals() -> None:
    """Put Python's own handling of SIGTERM back, where Ray's core took it over to print a stack. On the main thread."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
        signal.siginterrupt(signal.SIGTERM, False)


def _daemons() -> list["subprocess.Popen[bytes]"]:
    """Return the processes of a private cluster that are our own children."""
    return [process for group in _daemon_groups().values() for process in group]


def _vital() -> dict[str, "subprocess.Popen[bytes]"]:
    """Return those of them that a private cluster cannot do without."""
    groups = _daemon_groups()
    return {name: groups[name][0] for name in _VITAL if groups.get(name)}


def _is_lost() -> bool:
    return any(daemon.poll() is not None for daemon in _vital().values())


def _daemon_groups() -> dict[str, list["subprocess.Popen[bytes]"]]:
    node = getattr(sys.modules["ray._private.worker"], "_global_node", None)
    groups = getattr(node, "all_processes", {})
    return {name: [info.process for info in group] for name, group in groups.items()}


def _silence_raylet() -> None:
    """Send the raylet's remarks to our log: Ray prints them on our standard output, and has no switch for it."""
    module = sys.modules["ray._private.worker"]
    if hasattr(module, "print_to_stdstream"):
        vars(module)["print_to_stdstream"] = lambda data, ignore_prefix: _log.debug("raylet: %s", data.get("lines"))
