"""The machinery of benchmarks.kv_links, small: two real processes in two namespaces, two profiles, a rate that drifts.

What it guards: that every request of a run comes back with an outcome, that what lands is what was sent, and that no
namespace is left. No times are asserted.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks.kv_links_fleet import Order, open_fleet, totals
from benchmarks.kv_links_model import record_kv, texts_of_tiny
from benchmarks.kv_links_workload import Scenario, requests_of
from benchmarks.netns import NetnsUnavailable, ShapedPair, sweep

_NAMESPACES = Path("/run/netns")


@pytest.fixture
def pair() -> Iterator[ShapedPair]:
    with ExitStack() as stack:
        try:
            shaped = stack.enter_context(ShapedPair())
        except NetnsUnavailable as error:
            pytest.skip(f"no shaped namespaces here: {error}")
        yield shaped
    assert not (_NAMESPACES / shaped.near.namespace).exists()
    assert not (_NAMESPACES / shaped.far.namespace).exists()


@pytest.mark.slow
@pytest.mark.timeout(300)  # both processes compile the codec's kernels where nobody has yet
async def test_every_request_ends_and_what_lands_is_what_was_sent(pair: ShapedPair, tmp_path: Path) -> None:
    recorded = tmp_path / "kv.pt"
    torch.save(record_kv(texts_of_tiny(), num_windows=4), recorded)
    scenario = Scenario(seed=5, num_requests=10, warm_up=2)
    rates = ((0.0, 2e9), (0.1, 5e8), (0.2, 2e9))
    async with open_fleet(pair, recorded, "ladder") as fleet:
        raw = totals(await fleet.run(Order("none", scenario, rates)))
        small = totals(await fleet.run(Order("x4", scenario, rates)))
    for result in (raw, small):
        assert (result["requests"], result["failures"]) == (10, 0)
    assert raw["profiles"] == {"none": 10}
    assert raw["relative_error"] == 0
    assert raw["ratio"] == 1
    assert small["profiles"] == {"x4": 10}
    assert 0 < small["relative_error"] < 0.2
    assert small["ratio"] > 3


def test_the_shaped_rate_is_set(pair: ShapedPair) -> None:
    pair.shape(123e6)
    shown = subprocess.run(
        ["tc", "-n", pair.far.namespace, "qdisc", "show", "dev", pair.far.device],
        capture_output=True,
        text=True,
        check=True,
    )
    assert pair.shaper in shown.stdout
    assert pair.shaper == "htb" or "123Mbit" in shown.stdout


def test_a_sweep_removes_namespaces_of_dead_processes_only(pair: ShapedPair) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale = f"tandem-{ended.pid}-far"
    subprocess.run(["ip", "netns", "add", stale], check=True)
    assert stale in sweep()
    assert not (_NAMESPACES / stale).exists()
    assert (_NAMESPACES / f"tandem-{os.getpid()}-near").exists()


def test_the_scenario_is_the_same_in_every_process_and_has_the_stated_rate() -> None:
    scenario = Scenario(seed=3, num_requests=400)
    requests = requests_of(scenario)
    assert requests == requests_of(Scenario.model_validate_json(scenario.model_dump_json()))
    tokens = sum(request.prompt_tokens for request in requests[scenario.warm_up :])
    assert tokens / requests[-1].arrival_s == pytest.approx(scenario.tokens_per_s)
    assert requests != requests_of(scenario.model_copy(update={"seed": 4}))
