"""Several real gateways over one real Redis, which dies and comes back: what one knows counts at the others."""

import asyncio
from pathlib import Path

from core.ids import WorkerId
from core.membership import LoadReport
from tests.fakes.cluster import text_request
from tests.fakes.gateways import Gateways, several_gateways
from tests.fakes.script import client_id


def hold_back(cluster: Gateways) -> None:
    """No prompt is computed from now on."""
    for worker in cluster.prefills:
        worker.script.go.clear()


def let_go(cluster: Gateways) -> None:
    for worker in cluster.prefills:
        worker.script.go.set()


def prompts(cluster: Gateways) -> list[list[str]]:
    """Which requests each prefill worker was asked for, whatever it said."""
    return [[client_id(submit.request.request_id) for submit in worker.submits] for worker in cluster.prefills]


def queued_at(cluster: Gateways, seat: int, worker_id: WorkerId) -> int:
    """Prompt tokens that wait at a worker, as a gateway believes: told by the worker, or sent by another gateway."""
    row = cluster.seats[seat].gateway.fleet.table.row(worker_id)
    assert row is not None
    return row.load.queued_prefill_tokens + row.peer_credit.prefill_tokens


async def all_know_each_other(cluster: Gateways) -> None:
    count = len(cluster.seats)
    await cluster.until(lambda: all(len(seat.gateway.replicas.peers) == count - 1 for seat in cluster.seats))


async def test_what_one_gateway_sent_counts_at_the_others(tmp_path: Path, checkpoint: Path) -> None:
    routing = {"priors": {"prefill_per_token_s": 1.0}}  # a prompt that is held back stays the load that it is
    async with several_gateways(tmp_path, checkpoint, 3, num_prefills=3, routing=routing) as cluster:
        await all_know_each_other(cluster)
        hold_back(cluster)
        calls = []
        for n, seat in enumerate(cluster.seats):
            calls.append(seat.generate(text_request("abcdefgh" + str(n), request_id=f"r{n}")))
            await cluster.wait_prefilling(f"r{n}")
            busy = [worker.worker_id for worker in cluster.prefills if worker.held]
            await cluster.until(
                lambda busy=busy: all(queued_at(cluster, other, name) > 0 for other in range(3) for name in busy)  # type: ignore[misc]
            )
        assert sorted(map(len, prompts(cluster))) == [1, 1, 1], "nobody even asked a busy worker"
        let_go(cluster)
        for call in calls:
            await call.read_all()
        tables = [seat.gateway.fleet.table for seat in cluster.seats]
        await cluster.until(lambda: not any(table.rows["peer_requests"].any() for table in tables))


async def test_without_redis_no_two_prompts_meet_at_a_worker_that_was_idle(tmp_path: Path, checkpoint: Path) -> None:
    routing = {"priors": {"prefill_per_token_s": 1.0}, "submit_slack_s": 1.2}  # about a token
    async with several_gateways(tmp_path, checkpoint, 3, num_prefills=3, num_decodes=3, routing=routing) as cluster:
        hold_back(cluster)
        for n, worker in enumerate(cluster.prefills):  # all gateways believe that p0 has least to do
            worker.script.pretended_load = LoadReport(queued_prefill_tokens=min(n, 1))
            worker.tell_load()
        await cluster.until(lambda: all(queued_at(cluster, seat, WorkerId("p2")) == 1 for seat in range(3)))
        cluster.redis.kill()
        calls = [
            seat.generate(text_request(f"{n}: a prompt of several blocks")) for n, seat in enumerate(cluster.seats)
        ]
        for worker in cluster.prefills:
            await worker.wait_until(lambda worker=worker: len(worker.held) == 1)  # type: ignore[misc]
        assert len(prompts(cluster)[0]) == 3, "all three asked it, and two were sent on"
        let_go(cluster)
        for call in calls:
            await call.read_all()
            assert call.text == "abcde"


async def test_a_new_gateway_knows_what_the_others_know(tmp_path: Path, checkpoint: Path) -> None:
    async with several_gateways(tmp_path, checkpoint, 2, num_prefills=3, num_decodes=3) as cluster:
        await all_know_each_other(cluster)
        first = cluster.seats[0]
        request = text_request("a prompt of several blocks", session_id="session")
        before = first.generate(request)
        await before.read_all()
        hold_back(cluster)
        waiting = first.generate(text_request("another prompt", request_id="waiting"))
        await cluster.wait_prefilling("waiting")
        busy = next(worker for worker in cluster.prefills if worker.held)
        third = await cluster.add()
        busy.tell_load()  # as every worker does, at least once a second
        await cluster.until(
            lambda: (
                queued_at(cluster, 2, busy.worker_id) > 0
                and len(third.gateway.fleet.index) >= 6
                and third.gateway.dispatcher.affinity.of("/session", asyncio.get_running_loop().time()) is not None
            )
        )
        let_go(cluster)
        await waiting.read_all()
        again = third.generate(request)
        await again.read_all()
        assert again.finished.usage.cached_tokens > 0
        assert again.finished.placement.prefill_worker == before.finished.placement.prefill_worker
        assert third.gateway.replicas.num_replicas == 3


async def test_redis_dies_and_comes_back_in_mid_run(tmp_path: Path, checkpoint: Path) -> None:
    async with several_gateways(tmp_path, checkpoint, 3) as cluster:
        await all_know_each_other(cluster)
        hold_back(cluster)
        running = [seat.generate(text_request(max_tokens=9)) for seat in cluster.seats]
        cluster.redis.kill()
        let_go(cluster)
        for call in running:
            await call.read_all()
        for seat in cluster.seats:
            call = seat.generate(text_request())
            await call.read_all()
            assert call.indices == list(range(5))
        assert all(seat.gateway.replicas.num_replicas == 3 for seat in cluster.seats)
        cluster.redis.start()
        for prefill, decode in zip(cluster.prefills, cluster.decodes, strict=True):
            await prefill.register()
            await decode.register()
        await all_know_each_other(cluster)


async def test_a_gateway_that_stops_is_forgotten_at_once(tmp_path: Path, checkpoint: Path) -> None:
    sharing = {"whole_interval_s": 0.05, "silent_after_s": 60.0}
    async with several_gateways(tmp_path, checkpoint, 2, sharing=sharing) as cluster:
        await all_know_each_other(cluster)
        first, second = cluster.seats
        await second.gateway.stop(0.0)
        await cluster.until(lambda: first.gateway.replicas.num_replicas == 1)
