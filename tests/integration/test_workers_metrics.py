"""What workers count, and where it is served."""

import asyncio
import json

from tests.worker_pair import D, P, record_of, request, worker_pair
from tests.worker_side import PATIENCE_S


async def test_the_record_says_where_metrics_are_served() -> None:
    async with worker_pair(metrics_port=0) as pair:
        await pair.generate(request("a"))
        pages = {}
        for worker_id in (P, D):
            record = await record_of(pair.store, worker_id)
            reader, writer = await asyncio.open_connection("127.0.0.1", record.metrics_port)
            writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            async with asyncio.timeout(PATIENCE_S):
                pages[worker_id] = (await reader.read()).decode()
            writer.close()
            await writer.wait_closed()
        for line, worker_id in (
            ('tandem_prefill_requests_total{outcome="handed_over",reason="TransferAcked"} 1.0', P),
            ('tandem_decode_requests_total{outcome="finished",reason="StreamFinished"} 1.0', D),
        ):
            assert line in pages[worker_id]
            assert "tandem_kv_transfer_" in pages[worker_id]


async def test_metrics_that_nobody_asked_for_are_not_served() -> None:
    async with worker_pair() as pair:
        for worker_id in (P, D):
            assert (await record_of(pair.store, worker_id)).metrics_port == 0


async def test_metrics_count_what_happened() -> None:
    async with worker_pair() as pair:
        await pair.generate(request("a", 20))
        await pair.submit_decode(request("b", 64))
        await pair.to_decode.answer("rejected", "b")
        await pair.until_idle()
        prefill, decode = pair.prefill.metrics.registry, pair.decode.metrics.registry
        handed = {"outcome": "handed_over", "reason": "TransferAcked"}
        assert prefill.get_sample_value("tandem_prefill_requests_total", handed) == 1
        assert prefill.get_sample_value("tandem_prefill_prompt_tokens_total") == 20
        assert decode.get_sample_value("tandem_decode_tokens_total") == 5
        assert prefill.get_sample_value("tandem_prefill_tokens_total") == 1
        await pair.submit_decode(request("c", 9), generate=True)
        await pair.to_decode.until_finished("c")
        await pair.submit_prefill(request("c", 8), hand_off=False)
        await pair.to_prefill.until_finished("c")
        assert decode.get_sample_value("tandem_decode_prompt_tokens_total") == 9
        assert prefill.get_sample_value("tandem_prefill_prompt_tokens_total") == 28
        assert prefill.get_sample_value("tandem_prefill_tokens_total") == 7
        finished = {"outcome": "finished", "reason": "StreamFinished"}
        assert prefill.get_sample_value("tandem_prefill_requests_total", finished) == 1
        refused = {"outcome": "rejected", "reason": "too_long"}
        assert decode.get_sample_value("tandem_decode_requests_total", refused) == 1
        json.dumps({sample.name: sample.value for metric in decode.collect() for sample in metric.samples})
