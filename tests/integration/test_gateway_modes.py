"""The gateway over real gRPC: late binding, one worker alone, conditional questions, breakers, sessions, the door."""

import asyncio
from pathlib import Path

import grpc
import pytest

from core.errors import RejectReason
from core.membership import LoadReport
from protos import admin_pb2, worker_pb2
from protos import inference_pb2 as pb
from router.forwarding.breaker import BreakerState
from tests.fakes.cluster import fake_cluster, text_request
from tests.fakes.reading import collect, fails, refusal_of
from tests.fakes.script import refusal

LATE = {"modes": ["remote_prefill"], "late_binding": True}
ANY = {"modes": ["remote_prefill", "local_prefill", "colocated"]}


async def test_a_prompt_begins_while_no_decode_worker_has_room(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, routing=LATE) as cluster:
        prefill, decode = cluster.prefills[0], cluster.decodes[0]
        decode.script.always_refuse = refusal(RejectReason.NO_BLOCKS)
        call = cluster.generate(text_request(request_id="r"))
        await call.read_tokens(1)
        assert call.indices == [0], "the first token waits for nobody"
        [submit] = prefill.submits
        assert isinstance(submit, worker_pb2.PrefillSubmit)
        assert (submit.bind_later, submit.decode_worker_id) == (True, "")
        assert cluster.gateway.dispatcher.num_queued == 0
        decode.script.always_refuse = None
        await call.read_all()
        assert call.text == "abcde"
        [bind] = prefill.binds
        assert (bind.request_id, bind.decode_worker_id) == (submit.request.request_id, "d0")
        assert decode.submits[-1].request.request_id == submit.request.request_id == submit.transfer_id
        placement = call.finished.placement
        assert (placement.mode, placement.binding, placement.decode_worker) == ("remote_prefill", "late", "d0")
        assert placement.attempts == len(decode.submits) + 1
        assert cluster.holds_nothing()


async def test_a_prompt_that_nobody_takes_over_is_generated_where_it_was_computed(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, routing=LATE, workers={"hold_timeout_s": 0.05}) as cluster:
        cluster.decodes[0].script.always_refuse = refusal(RejectReason.NO_BLOCKS)
        got = await collect(cluster.inference.Generate(text_request()))
        assert (got.text, got.indices) == ("abcde", [0, 1, 2, 3, 4])
        placement = got.finished.placement
        assert (placement.mode, placement.mode_reason) == ("colocated", "no_decode_pool")
        assert (placement.prefill_worker, placement.decode_worker, placement.binding) == ("p0", "", "")
        assert [bind.decode_worker_id for bind in cluster.prefills[0].binds] == [""]
        assert cluster.holds_nothing()


async def test_prompts_without_a_decode_worker_are_bounded_and_served_in_turn(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, routing=LATE, forwarding={"max_late_bound": 2}) as cluster:
        prefill, decode = cluster.prefills[0], cluster.decodes[0]
        decode.script.always_refuse = refusal(RejectReason.NO_BLOCKS)
        calls = [cluster.generate(text_request(request_id=f"r{index}")) for index in range(6)]
        results = [asyncio.create_task(call.read_all()) for call in calls]
        await decode.wait_until(lambda: len(decode.submits) >= 20)
        assert len(prefill.submits) == 2
        assert cluster.gateway.dispatcher.num_queued == 4
        decode.script.always_refuse = None
        await asyncio.gather(*results)
        assert [call.text for call in calls] == ["abcde"] * 6
        assert cluster.holds_nothing()


async def test_an_aborted_prompt_that_waits_for_a_decode_worker_frees_its_kv(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, routing=LATE) as cluster:
        cluster.decodes[0].script.always_refuse = refusal(RejectReason.NO_BLOCKS)
        call = cluster.generate(text_request(request_id="r"))
        await call.read_tokens(1)
        call.cancel()
        await cluster.prefills[0].wait_aborted("r")
        await cluster.wait_idle()
        assert cluster.prefills[0].held == set()
        assert cluster.holds_nothing()


@pytest.mark.parametrize("missing", ["decodes", "prefills"])
async def test_one_pool_serves_alone_when_the_other_is_missing(checkpoint: Path, missing: str) -> None:
    num_prefills, num_decodes = int(missing != "prefills"), int(missing != "decodes")
    async with fake_cluster(
        checkpoint, num_prefills=num_prefills, num_decodes=num_decodes, is_waited_for=False, routing=ANY
    ) as cluster:
        await cluster.wait_live(1)
        got = await collect(cluster.inference.Generate(text_request()))
        assert got.text == "abcde"
        placement = got.finished.placement
        assert (placement.mode, placement.binding) == ("colocated", "")
        assert placement.mode_reason == f"no_{missing.removesuffix('s')}_pool"
        assert [placement.prefill_worker, placement.decode_worker] == [
            "p0" if missing == "decodes" else "",
            "d0" if missing == "prefills" else "",
        ]
        assert got.finished.timing.ttft_s > 0
        assert placement.predicted_ttft_s > 0
        assert cluster.holds_nothing()


async def test_a_decode_worker_that_holds_the_prefix_does_the_rest_itself(checkpoint: Path) -> None:
    prompt = "You are a helpful assistant, and you answer in one short sentence. "
    routing = {"modes": ["remote_prefill", "local_prefill"], "late_binding": False}
    async with fake_cluster(checkpoint, routing=routing) as cluster:
        warm = await collect(cluster.inference.Generate(text_request(prompt + "One?", max_tokens=2)))
        assert warm.finished.placement.mode == "remote_prefill"
        await cluster.wait_cache(len(prompt + "One?") // 4)
        got = await collect(cluster.inference.Generate(text_request(prompt + "Two?", max_tokens=2)))
        placement = got.finished.placement
        assert placement.mode == "local_prefill", placement
        assert (placement.mode_reason, placement.decode_worker) == ("prefix_at_decode", "d0")
        assert got.text == "ab"


async def test_a_worker_that_is_busier_than_was_thought_sends_the_request_elsewhere(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=2) as cluster:
        busy, other = cluster.prefills
        busy.script.pretended_load = LoadReport(queued_prefill_tokens=1_000_000)  # and has told nobody
        got = [await collect(cluster.inference.Generate(text_request(request_id=f"r{index}"))) for index in range(6)]
        assert {one.finished.placement.prefill_worker for one in got} == {other.worker_id}
        assert len(busy.submits) == 1, "its refusal told of its load"
        assert sorted(one.finished.placement.attempts for one in got) == [1, 1, 1, 1, 1, 2]
        assert cluster.holds_nothing()


async def test_a_cluster_that_is_busy_all_over_takes_the_third_question(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=3) as cluster:
        for worker in cluster.prefills:
            worker.script.pretended_load = LoadReport(queued_prefill_tokens=1_000_000)
        got = await collect(cluster.inference.Generate(text_request()))
        assert got.text == "abcde"
        assert got.finished.placement.attempts == 3


async def test_a_worker_that_loses_work_is_left_alone_for_a_while(checkpoint: Path) -> None:
    breaker = {"failures": 2, "open_min_s": 60.0, "open_max_s": 60.0}
    turns = {"policy": "round_robin", "modes": ["remote_prefill"]}
    async with fake_cluster(checkpoint, num_prefills=2, routing=turns, forwarding={"breaker": breaker}) as cluster:
        bad, good = cluster.prefills
        bad.script.failure = worker_pb2.WorkFailed(grpc_code="UNAVAILABLE", reason="cuda error")
        for index in range(12):
            await collect(cluster.inference.Generate(text_request(request_id=f"r{index}")))
        assert len(bad.submits) == 2
        breakers = cluster.gateway.dispatcher.breakers
        assert breakers.state_of(bad.worker_id, 0.0)[0] is BreakerState.OPEN
        assert list(breakers.not_closed()) == [bad.worker_id]
        bad.script.failure = None
        await good.kill()
        await cluster.wait_live(2)
        got = await collect(cluster.inference.Generate(text_request()))
        assert got.finished.placement.prefill_worker == bad.worker_id, "a breaker never empties a pool"


async def test_refusals_are_no_failures(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=2, forwarding={"breaker": {"failures": 1}}) as cluster:
        for worker in cluster.decodes:
            worker.script.refusals.extend(refusal(RejectReason.NO_BLOCKS) for _ in range(5))
        await collect(cluster.inference.Generate(text_request()))
        assert list(cluster.gateway.dispatcher.breakers.not_closed()) == []


@pytest.mark.parametrize("where", ["request", "metadata"])
async def test_a_session_stays_with_its_workers(checkpoint: Path, where: str) -> None:
    async with fake_cluster(checkpoint, num_prefills=4, num_decodes=4) as cluster:
        seen = set()
        for turn in range(6):
            request = text_request(f"{turn}", session_id="s" if where == "request" else "")
            metadata = (("x-session-id", "s"),) if where == "metadata" else ()
            got = await collect(cluster.inference.Generate(request, metadata=metadata))
            seen.add((got.finished.placement.prefill_worker, got.finished.placement.decode_worker))
        assert len(seen) == 1
        affinity = cluster.gateway.dispatcher.affinity
        [(key, binding)] = affinity.items(0.0)
        assert (key, {(binding.prefill, binding.decode)}) == ("/s", seen)
        await collect(cluster.inference.Generate(text_request("other", session_id="s", tenant="b")))
        assert {key for key, _ in affinity.items(0.0)} == {"/s", "b/s"}, "each tenant's own"


async def test_a_request_that_would_come_too_late_is_refused_with_the_reason_and_a_time(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        hurried = pb.Slo(ttft_s=0.5)
        await collect(cluster.inference.Generate(text_request(slo=hurried)))
        prefill = cluster.prefills[0]
        prefill.script.pretended_load = LoadReport(queued_prefill_tokens=1_000_000)
        prefill.tell_load()
        await cluster.wait_load(prefill.worker_id, lambda load: load.queued_prefill_tokens > 0)
        error = await fails(cluster.inference.Generate(text_request(slo=hurried)), grpc.StatusCode.RESOURCE_EXHAUSTED)
        reason, retry_after_s = refusal_of(error)
        assert reason == "SLO_TTFT"
        assert retry_after_s > 1.0
        assert (await collect(cluster.inference.Generate(text_request()))).text == "abcde", (
            "without a target it may wait"
        )


async def test_a_request_is_explained_with_what_was_expected_and_what_came(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=3, num_decodes=2) as cluster:
        got = await collect(cluster.inference.Generate(text_request(request_id="asked")))
        await collect(cluster.inference.Generate(text_request(request_id="other")))
        reply = await cluster.admin.ExplainRequest(admin_pb2.ExplainRequestRequest(request_id="asked"))
        [decision] = reply.decisions
        placement = got.finished.placement
        assert (decision.request_id, decision.mode) == ("asked", "remote_prefill")
        assert (decision.winner.prefill_worker, decision.winner.decode_worker) == (
            placement.prefill_worker,
            placement.decode_worker,
        )
        assert len(decision.candidates) == 6
        totals = [candidate.total_s for candidate in decision.candidates]
        assert totals == sorted(totals)
        assert decision.winner.total_s == pytest.approx(sum(decision.winner.terms_s.values()))
        assert decision.num_eligible == 5
        assert decision.winner.predicted_ttft_s == placement.predicted_ttft_s
        assert decision.outcome.ttft_s == pytest.approx(got.finished.timing.ttft_s)
        error_s = got.finished.timing.ttft_s - placement.predicted_ttft_s
        assert decision.outcome.ttft_error_s == pytest.approx(error_s)
        newest = await cluster.admin.ExplainRequest(admin_pb2.ExplainRequestRequest(last=1))
        assert [one.request_id for one in newest.decisions] == ["other"]


async def test_wrong_service_terms_are_named(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        for request, field in (
            (text_request(priority=99), "terms.priority"),
            (text_request(slo=pb.Slo(ttft_s=-1.0)), "terms.slo.ttft_s"),
            (text_request(session_id="x" * 300), "terms.session_id"),
        ):
            error = await fails(cluster.inference.Generate(request), grpc.StatusCode.INVALID_ARGUMENT)
            assert field in (error.details() or "")
