"""What a service's process is given before the service is built."""

import os

import pytest

from cluster.config import ClusterConfig
from cluster.launch import engine_environment
from cluster.service_host import Seat, Service, ServiceHost
from tests.echo_service import EchoService

SPIN = "GOMP_SPINCOUNT"


@pytest.mark.parametrize(
    ("configured", "on_seat", "is_set"),
    [(None, 1, False), (None, 2, True), (1, 4, False), (3, 1, True)],
    ids=["one core", "two cores", "one by choice", "three by choice"],
)
def test_threads_that_wait_for_each_other_spin_briefly(configured: int | None, on_seat: int, is_set: bool) -> None:
    config = ClusterConfig.model_validate({"model": {"path": "m"}, "prefill": {"engine": {"num_threads": configured}}})
    assert (SPIN in dict(engine_environment(config.prefill, on_seat))) is is_set


@pytest.mark.parametrize(("before", "seen"), [(None, "3000"), ("7", "7")], ids=["ours", "the operator's"])
async def test_the_environment_is_there_when_the_service_is_built(
    before: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(SPIN, before or "")
    if before is None:
        monkeypatch.delenv(SPIN)
    found: list[str | None] = []

    def build(seat: Seat) -> Service:
        found.append(os.environ.get(SPIN))
        return EchoService("serve", seat)

    host = ServiceHost(build)
    started = await host.start(Seat(frozenset(), 2, "127.0.0.1", ((SPIN, "3000"),)))
    await host.stop(1.0)
    assert (found, started.problem) == ([seen], "")
