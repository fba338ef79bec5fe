"""Processes as real Ray actors: seats, deaths, refusals, and nothing left behind."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from functools import partial

import psutil
import pytest
import pytest_asyncio

from cluster.config import RayConfig
from cluster.preflight import packages_folder
from cluster.ray_backend import RayActor, RayBackend
from cluster.service_host import Seat, Whereabouts
from cluster.supervision.incarnation import SpawnError
from cluster.workspace import GONE, marked_processes, workspace
from core.errors import ConfigError
from tests.echo_service import EchoService

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[RayBackend]:
    before = {one.pid for one in psutil.Process().children(recursive=True)}  # of other tests: a fork server
    with workspace() as (folder, mark):
        temp = folder / "ray"
        temp.mkdir()
        backend = await asyncio.to_thread(
            RayBackend.connect, RayConfig(), namespace="test", packages=packages_folder(), names=(), temp=temp
        )
        await asyncio.to_thread(backend.reserve, "echo", [{"CPU": 0.5}, {"CPU": 0.5}], "PACK", 30.0)
        yield backend
        ours = {one.pid for one in psutil.Process().children(recursive=True)} - before
        marked = {one.pid for one in marked_processes(mark)}
        await asyncio.to_thread(backend.close)  # before any assertion: Ray ends a process that has lost its cluster
        assert len(marked) > 5
        assert len(ours - marked) == 1, "a process of Ray's is not known to be ours (one is: the reaper)"
    assert marked_processes(mark) == []


def _seat(whereabouts: Whereabouts) -> Seat:
    return Seat(frozenset({min(whereabouts.cores)}), 3, whereabouts.address)


def _is_gone(pid: int) -> bool:
    """A zombie holds nothing any more; its parent, the raylet, collects it when it pleases."""
    try:
        return psutil.Process(pid).status() in GONE
    except psutil.NoSuchProcess:
        return True


async def _spawn(backend: RayBackend, behaviour: str, bundle: int = 0) -> RayActor:
    return await backend.spawn(partial(EchoService, behaviour), _seat, pool="echo", bundle=bundle)


async def test_a_service_serves_on_its_seat_and_stops(backend: RayBackend) -> None:
    actor = await _spawn(backend, "serve")
    assert psutil.pid_exists(actor.pid)
    assert actor.pid != os.getpid()
    host, cores, threads, _ = (await actor.start()).split("|")
    assert host
    assert cores == str(min(os.sched_getaffinity(0)))
    assert threads == "3"
    await actor.stop(1.0)
    async with asyncio.timeout(10):
        assert await actor.ended() == "stopped"
    assert _is_gone(actor.pid)


async def test_beside_the_launcher(backend: RayBackend) -> None:
    actor = await backend.spawn(partial(EchoService, "serve"), _seat, pool=None)
    await actor.start()
    await actor.kill()
    async with asyncio.timeout(10):
        assert await actor.ended() == "killed"


async def test_a_death_is_noticed_at_once_and_the_place_is_free_again(backend: RayBackend) -> None:
    for _ in range(2):
        actor = await _spawn(backend, "serve", bundle=1)
        await actor.start()
        ending = asyncio.create_task(actor.ended())
        os.kill(actor.pid, signal.SIGKILL)
        async with asyncio.timeout(2.0):  # the promise of supervision
            assert "process died" in await ending


async def test_a_process_that_hears_nothing_is_killed_all_the_same(backend: RayBackend) -> None:
    actor = await _spawn(backend, "serve")
    await actor.start()
    os.kill(actor.pid, signal.SIGSTOP)
    await actor.kill()
    async with asyncio.timeout(10):
        await actor.ended()
    assert _is_gone(actor.pid)


async def test_death_while_starting(backend: RayBackend) -> None:
    actor = await _spawn(backend, "hang")
    starting = asyncio.create_task(actor.start())
    ending = asyncio.create_task(actor.ended())
    await asyncio.sleep(0)
    os.kill(actor.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        with pytest.raises(SpawnError, match="process died"):
            await starting
        assert "process died" in await ending


async def test_a_refusal_is_told_in_its_own_words(backend: RayBackend) -> None:
    actor = await _spawn(backend, "refuse")
    with pytest.raises(SpawnError, match=r"^model\.path: no such model$"):
        await actor.start()
    async with asyncio.timeout(10):
        assert await actor.ended() == "failed to start"


async def test_a_service_that_gives_up_says_why(backend: RayBackend) -> None:
    actor = await _spawn(backend, "give_up")
    await actor.start()
    async with asyncio.timeout(10):
        assert await actor.ended() == "gave up: fenced"


async def test_no_place(backend: RayBackend) -> None:
    with pytest.raises(ConfigError, match=r"big\.resources: no place for 1 x \(1000 CPU\)"):
        await asyncio.to_thread(backend.reserve, "big", [{"CPU": 1000.0}], "PACK", 0.2)


async def test_an_address_where_nobody_listens(backend: RayBackend, unused_tcp_port: int) -> None:
    config = RayConfig(address=f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(ConfigError, match=r"ray\.address: cannot reach"):
        await asyncio.to_thread(
            RayBackend.connect, config, namespace="x", packages=packages_folder(), names=(), temp=packages_folder()
        )
