"""What one worker would cost: eligibility, the prompt's side and the decode's side of the one cost. Compiled. Pure.

    queue     prompt seconds accepted there, drained since the report, plus credit of this and of other gateways
    prefill   a + b*u + c*u*(h + u/2) of the u tokens that it does not hold after the h that it does; of the part that
              is missing of a hot prefix only the share of one use, since others will use it there
    crowding  the same again for those who will come while it is computed, and wait behind it: by how many prompts the
              prefill workers have on average, wherever it goes, so that it moves no work between the pools; at the
              pool's mean speed, because times the crowd the noise of each worker's own fit would decide; and not for
              what is hot, whose new copy serves those who wait
    host      loading what it holds in its host tier, where that is quicker than computing it
    decode    steps * step of its batch as it will be when the prefill ends, plus the wait for blocks
    slo       weighted seconds beyond the targets of the request
    affinity  for leaving the workers of its session

Every term is finite, at least 0, and does not fall when a load grows. `router.routing.search` joins the sides.
"""

from typing import Any

import numpy as np

from core.compiled import compiled, inner
from router.routing.columns import RoleCode

TOO_LONG_BIT, REFUSED_BIT, NOT_LIVE_BIT = 1, 2, 4

# As numpy scalars: plain ones are literals to the compiler, and make a copy of every function that they are passed to.
_PREFILL: Any = np.int64(RoleCode.PREFILL)
_DECODE: Any = np.int64(RoleCode.DECODE)
_OPEN: Any = np.int64(-1)
_NO: Any = np.bool_(False)
_YES: Any = np.bool_(True)


@inner
def queued_s(worker: Any, now: float) -> Any:
    """Return the seconds of prompts that wait at a worker."""
    reported = worker.queued_tokens * worker.s_per_token - max(0.0, now - worker.reported_at)
    return max(0.0, reported) + worker.credit_prefill_s + worker.peer_prefill_s


@inner
def prefill_seconds(worker: Any, uncached: float, held: float) -> Any:
    return worker.prefill_a + worker.prefill_b * uncached + worker.prefill_c * uncached * (held + uncached * 0.5)


@inner
def step_seconds(worker: Any, requests: float, context_tokens: float) -> Any:
    return worker.decode_c0 + worker.decode_c1 * requests + worker.decode_c2 * context_tokens


@inner
def batch_at(worker: Any, joins: Any, now: float, horizon_s: float, s: Any) -> tuple[float, float]:
    """Return the (requests, context tokens) that a decode worker will run at now + horizon.

    Some of those who run will have left, and those who are known to come will have joined. But others will come of whom
    nobody knows yet, and in a steady state they replace who leaves: so it is never less than what runs now.
    """
    stays = 1.0
    if s.use_forecast:
        life_s = worker.mean_steps * step_seconds(worker, worker.running, worker.context_tokens)
        stays = np.exp(-horizon_s / max(life_s, 1e-9))
    requests = worker.due_requests + worker.peer_requests + max(0.0, worker.reserved - worker.own_reserved)
    tokens = worker.due_tokens + worker.peer_context_tokens
    tokens += max(0.0, worker.reserved_tokens - worker.own_reserved_tokens)
    if worker.role == _DECODE:
        num_buckets = joins.shape[0]
        first = int(np.floor(now / s.bucket_s))
        last = first + num_buckets - 1
        if s.use_forecast:
            last = min(last, int(np.floor((now + horizon_s) / s.bucket_s)))
        place = first % num_buckets
        for _ in range(first, last + 1):
            requests += joins[place, 0]
            tokens += joins[place, 1]
            place = place + 1 if place + 1 < num_buckets else 0
    requests = max(worker.running, worker.running * stays + requests)
    tokens = max(worker.context_tokens, worker.context_tokens * stays + tokens)
    return requests, tokens


@inner
def room_wait_s(worker: Any, missing_tokens: float, step_s: float) -> Any:
    """Return how long blocks for so many tokens will be waited for. A worker that reports no pool has room."""
    if worker.total_blocks <= 0.0:
        return 0.0
    block_size = max(1.0, worker.block_size)
    coming = np.ceil((worker.credit_context_tokens + worker.peer_context_tokens) / block_size)
    free = worker.free_blocks - coming
    short = np.ceil(missing_tokens / block_size) - free
    if short <= 0.0:
        return 0.0
    return short / max(1.0, worker.total_blocks - free) * worker.mean_steps * step_s


@inner
def price_prompt(
    worker: Any, device: float, host: float, reuses: float, crowd: tuple[float, float, float], q: Any, s: Any, out: Any
) -> None:
    """Fill what computing the prompt on one worker takes: waiting, whole and charged compute, loading, late TTFT.

    `crowd`: the pool's mean prefill coefficients, times the price of crowding.
    """
    held = min(device, q.reusable_tokens)
    full_s = prefill_seconds(worker, q.prompt_tokens - held, held)
    load_s = 0.0
    in_any = min(max(host, device), q.reusable_tokens)
    if in_any > held:
        loading_s = (in_any - held) * worker.kv_bytes_per_token / s.host_tier_bytes_per_s
        rest_s = prefill_seconds(worker, q.prompt_tokens - in_any, in_any)
        if rest_s + loading_s < full_s:
            held, full_s, load_s = in_any, rest_s, loading_s
    uncached, charged_s, cold_s = q.prompt_tokens - held, full_s, full_s
    missing = min(q.hot_tokens, q.prompt_tokens) - max(held, min(device, q.prompt_tokens - 1.0))
    if s.use_hot and missing > 0.0:
        part_s = worker.prefill_b * missing + worker.prefill_c * missing * (held + missing * 0.5)
        charged_s -= part_s * (reuses / (1.0 + reuses))
        cold_s -= part_s
    waiting_s = queued_s(worker, q.now)
    ready_s = waiting_s + full_s + load_s
    out.queue_s = waiting_s
    out.compute_s = full_s
    out.charged_s = charged_s
    out.load_s = load_s
    out.ttft_slo_s = s.slo_weight * max(0.0, q.waited_s + ready_s - q.slo_ttft_s)
    out.uncached_tokens = uncached
    out.held_tokens = held
    out.ready_s = ready_s
    out.crowding_s = crowd[0] + crowd[1] * uncached + crowd[2] * uncached * (held + uncached * 0.5)
    out.crowding_s *= max(0.0, cold_s) / max(full_s, 1e-9)
    out.prompt_cost_s = s.weigh_queue * waiting_s + s.weigh_prefill * charged_s + out.crowding_s
    out.prompt_cost_s += load_s + out.ttft_slo_s


@inner
def price_decode(worker: Any, joins: Any, device: float, horizon_s: float, q: Any, s: Any, out: Any) -> None:
    """Fill the columns of decoding on one worker from `horizon_s` on."""
    requests, tokens = batch_at(worker, joins, q.now, horizon_s, s)
    step_s = step_seconds(worker, requests + 1.0, tokens + q.prompt_tokens)
    held = min(device, q.prompt_tokens)
    room_s = room_wait_s(worker, q.prompt_tokens + 1.0 - held, step_s)
    out.steps_s = q.steps * step_s
    out.tpot_s = step_s
    out.room_s = room_s
    out.tpot_slo_s = s.slo_weight * q.steps * max(0.0, step_s - q.slo_tpot_s)
    out.decode_held_tokens = held
    out.raw_bytes = (q.prompt_tokens - held) * worker.kv_bytes_per_token
    out.decode_cost_s = s.weigh_decode * (out.steps_s + room_s) + out.tpot_slo_s


@inner
def eligible(
    rows: Any, refused: Any, num_slots: int, role: int, fixed: int, take_refused: bool, q: Any, s: Any, members: Any
) -> tuple[int, int, bool]:
    """Collect the workers of a role that can be asked: (their number, bits of the obstacles, whether there is a pool).

    A worker that is silent, or whose breaker is open, is left out only while there are others: filters that empty a
    pool turn a slow store or a burst of failures into an outage.
    """
    if fixed >= 0:
        members[0] = fixed  # it has accepted: it stays
        return 1, 0, True
    count, obstacles, has_pool, num_sound = 0, 0, False, 0
    for slot in range(num_slots):
        worker = rows[slot]
        if worker.role != role:
            continue
        if not worker.is_live:
            obstacles |= NOT_LIVE_BIT
            continue
        if 0.0 < worker.max_model_len < q.max_total_tokens:
            obstacles |= TOO_LONG_BIT
            continue
        has_pool = True
        if refused[slot] and not take_refused:
            obstacles |= REFUSED_BIT
            continue
        members[count] = slot
        count += 1
        if not worker.breaker_open and q.now - worker.heard_at <= s.stale_after_s:
            num_sound += 1
    if 0 < num_sound < count:
        kept = 0
        for position in range(count):
            worker = rows[members[position]]
            if not worker.breaker_open and q.now - worker.heard_at <= s.stale_after_s:
                members[kept] = members[position]
                kept += 1
        count = kept
    return count, obstacles, has_pool


@compiled
def price_workers(
    rows: Any, joins: Any, device: Any, host: Any, refused: Any, num_slots: int, query: Any, settings: Any, sides: Any,
    prefills: Any, decodes: Any, out: Any,
) -> None:  # fmt: skip
    """Fill `prefills` and `decodes` with the slots that can be asked, and `sides` with their prices.

    The decode side is priced for the moment when the earliest of the prefills would end: one moment for all, so that
    the two sides stay separate and the search over the pairs short.
    """
    q, s, found = query[0], settings[0], out[0]
    count_p, found.prefill_obstacles, found.has_prefill_pool = eligible(
        rows, refused, num_slots, _PREFILL, q.fixed_prefill, _NO, q, s, prefills
    )
    count_d, found.decode_obstacles, found.has_decode_pool = eligible(
        rows, refused, num_slots, _DECODE, q.fixed_decode, _NO, q, s, decodes
    )
    is_open = (
        q.needs_decode
        and q.allow_late
        and s.late_binding
        and s.allow_remote
        and q.fixed_prefill < 0
        and q.fixed_decode < 0
    )
    took_refused = is_open and count_p > 0 and count_d == 0 and found.has_decode_pool
    if took_refused:  # they refused now, but will have room
        count_d = eligible(rows, refused, num_slots, _DECODE, _OPEN, _YES, q, s, decodes)[0]
    found.num_prefill, found.num_decode, found.is_late = count_p, count_d, False

    prompts, pool_a, pool_b, pool_c = 0.0, 0.0, 0.0, 0.0
    for position in range(count_p):
        worker = rows[prefills[position]]
        prompts += (worker.prompts + worker.credit_requests + worker.peer_requests) / count_p
        pool_a += worker.prefill_a / count_p
        pool_b += worker.prefill_b / count_p
        pool_c += worker.prefill_c / count_p
    price = s.crowding_weight * prompts
    crowd = (price * pool_a, price * pool_b, price * pool_c)
    horizon_s = np.inf
    for position in range(count_p):
        slot = prefills[position]
        side = sides[slot]
        price_prompt(rows[slot], device[slot], host[slot], q.hot_reuses / count_p, crowd, q, s, side)
        if q.fixed_prefill >= 0:  # under way: only what is left of it counts
            side.queue_s, side.load_s, side.ttft_slo_s, side.crowding_s = 0.0, 0.0, 0.0, 0.0
            side.compute_s = side.charged_s = side.ready_s = q.remaining_prefill_s
            side.prompt_cost_s = s.weigh_prefill * q.remaining_prefill_s
        horizon_s = min(horizon_s, side.ready_s)
        price_decode(rows[slot], joins[slot], device[slot], side.ready_s, q, s, side)
        side.affinity_s = 0.0 if q.session_prefill < 0 or q.session_prefill == slot else s.affinity_s
        side.prompt_cost_s += side.affinity_s
    for position in range(count_d):
        slot = decodes[position]
        side = sides[slot]
        price_prompt(rows[slot], device[slot], host[slot], q.hot_reuses / count_d, crowd, q, s, side)
        price_decode(
            rows[slot], joins[slot], device[slot], min(horizon_s, 1e6) if count_p else side.ready_s, q, s, side
        )
        side.affinity_s = 0.0 if q.session_decode < 0 or q.session_decode == slot else s.affinity_s
        side.decode_cost_s += side.affinity_s
    if not (is_open and count_p and count_d):
        return
    least_s = np.inf
    for position in range(count_d):
        least_s = min(least_s, sides[decodes[position]].room_s)
    found.is_late = (took_refused or least_s > 0.0) and least_s <= horizon_s + s.late_patience_s
    if took_refused and not found.is_late:
        found.num_decode = 0
