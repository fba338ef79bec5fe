"""What a worker answers to a submission, and when: at once, by its own accounts, with its load."""

from core.errors import RejectReason
from tests.worker_pair import reason_of, request, worker_pair


async def test_a_full_prefill_queue_is_refused_while_a_step_runs() -> None:
    async with worker_pair(max_queued_tokens=50) as pair:
        pair.prefill_side.computing.close()
        for name in ("a", "b"):
            await pair.submit(request(name, 20))
        await pair.prefill_side.computing.until_reached()
        await pair.submit_prefill(request("c", 20))  # answered although the engine's thread is held
        assert reason_of(await pair.to_prefill.answer("rejected", "c")) is RejectReason.QUEUE_FULL
        pair.prefill_side.computing.open()
        for name in ("a", "b"):
            await pair.to_prefill.until_output(name)
        await pair.submit_decode(request("c", 20))
        await pair.submit_prefill(request("c", 20), attempt=1)
        await pair.to_prefill.answer("accepted", "c")


async def test_an_accept_does_not_wait_for_the_running_step() -> None:
    async with worker_pair() as pair:
        pair.prefill_side.computing.close()
        await pair.submit(request("a", 20))
        await pair.prefill_side.computing.until_reached()
        await pair.submit(request("b", 20))  # both accepted, the first step not done
        assert not pair.to_prefill.outputs("a")
        pair.prefill_side.computing.open()
        await pair.to_decode.until_finished("b")


async def test_a_load_report_counts_what_was_accepted_in_the_running_step() -> None:
    async with worker_pair() as pair:
        pair.prefill_side.computing.close()
        await pair.submit(request("a", 20))
        await pair.prefill_side.computing.until_reached()
        await pair.submit(request("b", 17))
        await pair.to_prefill.until(lambda report: report.load.queued_prefill_tokens >= 37)
        pair.prefill_side.computing.open()


async def test_a_decode_worker_without_blocks_refuses_and_accepts_when_some_came_back() -> None:
    async with worker_pair(num_blocks=10) as pair:
        await pair.submit_decode(request("a", 25))
        await pair.to_decode.answer("accepted", "a")
        await pair.submit_decode(request("b", 20))
        assert reason_of(await pair.to_decode.answer("rejected", "b")) is RejectReason.NO_BLOCKS
        await pair.abort_decode("a")
        await pair.until_idle()
        await pair.submit_decode(request("b", 20), attempt=1)
        await pair.to_decode.answer("accepted", "b")


async def test_a_decode_worker_takes_so_many_requests_and_no_more() -> None:
    async with worker_pair(max_decode_requests=1) as pair:
        await pair.submit_decode(request("a"))
        await pair.to_decode.answer("accepted", "a")
        await pair.submit_decode(request("b"))
        assert reason_of(await pair.to_decode.answer("rejected", "b")) is RejectReason.QUEUE_FULL


async def test_a_request_that_is_held_is_a_duplicate_and_one_too_long_is_too_long() -> None:
    async with worker_pair() as pair:
        pair.prefill_side.computing.close()
        await pair.submit(request("a"))
        await pair.submit_prefill(request("a"), attempt=1)
        assert reason_of(await pair.to_prefill.answer("rejected", "a")) is RejectReason.DUPLICATE
        await pair.submit_prefill(request("b", 64))
        assert reason_of(await pair.to_prefill.answer("rejected", "b")) is RejectReason.TOO_LONG
        await pair.submit_decode(request("b", 64))
        assert reason_of(await pair.to_decode.answer("rejected", "b")) is RejectReason.TOO_LONG
        pair.prefill_side.computing.open()


async def test_every_answer_tells_the_load_with_what_it_accepted() -> None:
    async with worker_pair(max_decode_requests=2) as pair:
        pair.prefill_side.computing.close()
        await pair.submit(request("a", 20))
        await pair.prefill_side.computing.until_reached()
        await pair.submit(request("b", 17))
        accepted = await pair.to_prefill.answer("accepted", "b")
        assert accepted.load.queued_prefill_tokens == 37
        accepted = await pair.to_decode.answer("accepted", "b")
        assert (accepted.load.num_reserved, accepted.load.reserved_tokens) == (2, 37)
        assert accepted.load.num_waiting == 2
        await pair.submit_decode(request("c"))
        rejected = await pair.to_decode.answer("rejected", "c")
        assert (rejected.load.num_reserved, rejected.load.reserved_tokens) == (2, 37)
        pair.prefill_side.computing.open()
        await pair.to_decode.until_finished("b")


async def test_the_reports_of_a_stream_have_growing_numbers() -> None:
    async with worker_pair() as pair:
        for name in ("a", "bb", "ccc"):
            await pair.generate(request(name, 20))
        for stream in (pair.to_prefill, pair.to_decode):
            numbers = []
            for report in stream.reports:
                kind = report.WhichOneof("report")
                if kind == "load":
                    numbers.append(report.load.sequence)
                elif kind in ("accepted", "rejected"):
                    numbers.append(getattr(report, kind).load.sequence)
            assert len(numbers) > 6
            assert numbers == sorted(set(numbers))


async def test_a_worker_that_does_nothing_tells_its_load_all_the_same() -> None:
    async with worker_pair(load_heartbeat_s=0.01) as pair:
        for stream in (pair.to_prefill, pair.to_decode):
            await stream.until(lambda report: report.load.sequence >= 5)


async def test_a_prefill_worker_that_is_busier_than_the_gateway_thought_refuses() -> None:
    async with worker_pair() as pair:
        pair.prefill_side.computing.close()
        await pair.submit_prefill(request("a", 20), hand_off=False, max_queued_tokens=0)
        await pair.to_prefill.answer("accepted", "a")
        await pair.submit_prefill(request("b", 5), hand_off=False, max_queued_tokens=19)
        rejected = await pair.to_prefill.answer("rejected", "b")
        assert reason_of(rejected) is RejectReason.BUSIER
        assert (rejected.load.queued_prefill_tokens, rejected.retry_after_s) == (20, 0.0)
        await pair.submit_prefill(request("cc", 5), hand_off=False, max_queued_tokens=20)
        await pair.to_prefill.answer("accepted", "cc")
        pair.prefill_side.computing.open()
        await pair.to_prefill.until_finished("cc")


async def test_a_decode_worker_that_is_busier_than_the_gateway_thought_refuses() -> None:
    async with worker_pair() as pair:
        pair.decode_side.computing.close()
        await pair.submit_decode(request("a", 20), generate=True, max_queued_tokens=0, max_requests_held=0)
        await pair.decode_side.computing.until_reached()
        await pair.submit_decode(request("b", 9), generate=True)  # unconditional; its engine cannot be asked now
        await pair.submit_decode(request("c", 5), generate=True, max_queued_tokens=28)
        assert reason_of(await pair.to_decode.answer("rejected", "c")) is RejectReason.BUSIER
        await pair.submit_decode(request("d", 5), max_requests_held=1)
        rejected = await pair.to_decode.answer("rejected", "d")
        assert reason_of(rejected) is RejectReason.BUSIER
        assert rejected.load.queued_prefill_tokens == 29
        pair.decode_side.computing.open()
        await pair.submit_decode(request("ee", 5), generate=True, max_queued_tokens=29, max_requests_held=2)
        for name in ("a", "b", "ee"):
            await pair.to_decode.until_finished(name)


async def test_a_hand_over_tells_of_its_link() -> None:
    async with worker_pair() as pair:
        for name in ("a", "bb", "ccc"):
            await pair.generate(request(name, 40))
        told = await pair.to_prefill.answer("handed_over", "ccc")
        assert told.link_rtt_s > 0
        assert told.link_queued_bytes == 0
