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
            await pair.to_prefill.answer("computed", name)
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
