"""A short run of the fuzzer of both doors, against a gateway process: `python -m tools.fuzz_doors` runs longer."""

from pathlib import Path

from tests.gateway_process import gateway_doors
from tools.fuzz_doors import Target, fuzz

RUNS = 1500
LIMIT_S = 120.0


async def test_spoilt_requests_are_the_clients_mistake_and_leave_nothing(tmp_path: Path) -> None:
    async with gateway_doors(tmp_path) as doors:
        target = Target(doors.grpc_address, doors.http_address, doors.authorization)
        files = doors.num_files()
        report = await fuzz(target, seed=1, runs=RUNS, seconds=LIMIT_S)
        assert report.findings == []
        assert report.answers.total() >= RUNS / 2, report.answers
        for answer in ("grpc OK", "grpc INVALID_ARGUMENT", "http 200", "http 400"):
            assert report.answers[answer] >= 20, report.answers
        await doors.ask_well()
        await doors.until(lambda: not doors.workers[0].held and not doors.workers[1].held)
        await doors.until(lambda: doors.num_files() <= files + 4)
        assert await doors.metric("tandem_gateway_active_requests") == 0
        assert "Traceback" not in doors.log.read_text()
