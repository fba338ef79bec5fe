"""A sender and a receiver in one process: parts go in on one side, KV and outcomes come out on the other."""

import torch

from tests.kv_peers import LAYOUT, Duo


async def test_chunked_parts_land_bit_exactly() -> None:
    async with Duo() as duo:
        transfer_id, kv, target = await duo.begin("a", num_tokens=37)
        for start in range(0, 37, 10):
            for layer in range(LAYOUT.num_layers):
                duo.sender.push(transfer_id, range(layer, layer + 1), range(start, min(start + 10, 37)))
        duo.sender.commit(transfer_id, first_token_id=42)
        assert await duo.landed.outcome(transfer_id) == "landed"
        assert await duo.sent.outcome(transfer_id) == "acked"
        assert torch.equal(kv, target)
        assert duo.landed.first_tokens[transfer_id] == 42
