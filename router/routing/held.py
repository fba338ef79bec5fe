"""How much of one prompt each worker holds, from the prefix index, in tokens by slot."""

import numpy as np

from core.kv_events import Tier
from router.index.prefix_index import PrefixIndex
from router.prompt_hashes import PromptHashes
from router.routing.query import HeldPrefixes
from router.routing.table import WorkerTable


def held_prefixes(index: PrefixIndex, table: WorkerTable, hashes: PromptHashes) -> HeldPrefixes:
    """Match the prompt once for every way to hash that workers use."""
    num_rows = len(table.rows)
    num_slots = max(num_rows, table.slots.capacity)
    keys = table.hash_keys
    device = np.zeros(num_rows)
    host = device
    hot_tokens, hot_reuses = 0, 0.0
    for code, key in enumerate(keys):
        match = index.match(hashes.of(key))
        if match.hot_blocks * key.block_size > hot_tokens:
            hot_tokens, hot_reuses = match.hot_blocks * key.block_size, match.hot_reuses
        if not match.runs:
            continue
        own = 1.0 if len(keys) == 1 else table.rows["hash_key"] == code
        scale = own * float(key.block_size)
        is_tiered = any(run.device != run.anywhere for run in match.runs)
        if is_tiered and host is device:
            host = device.copy()
        found = match.blocks(Tier.DEVICE, num_slots)[:num_rows] * scale
        if is_tiered:
            host += match.blocks(Tier.HOST, num_slots)[:num_rows] * scale
        elif host is not device:
            host += found
        device += found
    return HeldPrefixes(device, host, hot_tokens, hot_reuses)
