"""How much of one prompt each worker holds, from the prefix index, in tokens by slot."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.kv_events import Tier
from router.index.match import PrefixMatch
from router.index.prefix_index import PrefixIndex
from router.prompt_hashes import PromptHashes
from router.routing.query import HeldPrefixes
from router.routing.table import WorkerTable


def held_prefixes(index: PrefixIndex, table: WorkerTable, hashes: PromptHashes) -> HeldPrefixes:
    """Match the prompt once for every way to hash that workers use."""
    rows, keys = table.rows, table.hash_keys
    if len(keys) == 1:  # nearly always: no rollout is under way
        (key,) = keys
        match, size = index.match(hashes.of(key)), key.block_size
        return _held(match, table, float(size), match.hot_blocks * size, match.hot_reuses)
    found = HeldPrefixes(np.zeros(len(rows)), np.zeros(len(rows)))
    for key, code in keys.items():
        match = index.match(hashes.of(key))
        own = _held(match, table, (rows["hash_key"] == code) * float(key.block_size), 0, 0.0)
        hot = max((found.hot_tokens, found.hot_reuses), (match.hot_blocks * key.block_size, match.hot_reuses))
        found = HeldPrefixes(found.device + own.device, found.host + own.host, *hot)
    return found


def _held(match: PrefixMatch, table: WorkerTable, scale: Any, hot_tokens: int, hot_reuses: float) -> HeldPrefixes:
    num_rows = len(table.rows)
    num_slots = max(num_rows, table.slots.capacity)

    def tokens(tier: Tier) -> NDArray[np.float64]:
        held: NDArray[np.float64] = match.blocks(tier, num_slots)[:num_rows] * scale
        return held

    device = tokens(Tier.DEVICE)
    is_tiered = any(run.device != run.anywhere for run in match.runs)
    return HeldPrefixes(device, tokens(Tier.HOST) if is_tiered else device, hot_tokens, hot_reuses)
