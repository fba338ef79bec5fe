"""The search for the cheapest placements over (prefill worker, decode worker, mode). Compiled. Pure.

Joins the sides that `router.routing.prices` priced, and adds what only a pair has:

    transfer  of the bytes that the decode worker does not hold, compressed as lately seen: what the prefill cannot hide
    handicap  of one worker doing it all while both pools are there

The search is exact to two nanoseconds over the cheapest `candidates_per_role` of each role. The prefill side and a
lower bound of the decode side are sorted; a pair whose sum of these cannot enter the list of the best is never priced.
Equal costs are told apart by a random part of a nanosecond, so that which worker sits in which slot decides nothing.
"""

from typing import Any

import numpy as np

from core.compiled import compiled, inner
from router.routing.columns import CANDIDATE, ModeCode, RoleCode
from router.routing.transfer import transfer_seconds

TIE_S = 1e-9

# As numpy scalars: plain ones are literals to the compiler, and make a copy of every function that they are passed to.
_PREFILL: Any = np.int64(RoleCode.PREFILL)
_NOBODY: Any = np.int64(-1)
_ZERO: Any = np.int64(0)
_REMOTE, _LOCAL, _COLOCATED = int(ModeCode.REMOTE_PREFILL), int(ModeCode.LOCAL_PREFILL), int(ModeCode.COLOCATED)
_MAX_LAYOUTS = 16


@inner
def jitter_s(seed: int, slot: int) -> float:
    """Return a random part of TIE_S, the same for the same seed and slot."""
    mixed = np.uint64(seed) + np.uint64(slot + 1) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return np.float64(mixed >> np.uint64(11)) * (TIE_S / 9007199254740992.0)


@inner
def cheapest(rows: Any, keys: Any, members: Any, layout: int, limit: int, heap: Any, out: Any, start: int) -> Any:
    """Write the `limit` members of a layout with the smallest keys, smallest first, from `start` on; return the end.

    A heap, popped so often: of a thousand workers a few dozen are wanted.
    """
    count = _ZERO
    for slot in members:
        if rows[slot].layout == layout:
            heap[count] = slot
            count += 1
    for root in range(count // 2 - 1, -1, -1):
        _sift(heap, keys, root, count)
    end = start + min(limit, count)
    for position in range(start, end):
        out[position] = heap[0]
        count -= 1
        heap[0] = heap[count]
        _sift(heap, keys, _ZERO, count)
    return end


@inner
def _sift(heap: Any, keys: Any, root: int, count: int) -> None:
    item = heap[root]
    while True:
        child = 2 * root + 1
        if child >= count:
            break
        if child + 1 < count and keys[heap[child + 1]] < keys[heap[child]]:
            child += 1
        if keys[heap[child]] >= keys[item]:
            break
        heap[root] = heap[child]
        root = child
    heap[root] = item


@inner
def _insert(top: Any, count: int, total_s: float) -> Any:
    """Make a place in the list of the cheapest; return where, or -1."""
    limit = top.shape[0]
    if count == limit and total_s >= top[limit - 1].total_s:
        return -1
    at = min(count, limit - 1)
    while at > 0 and top[at - 1].total_s > total_s:
        top[at] = top[at - 1]
        at -= 1
    top[at].total_s = total_s
    return at


@inner
def _fill_prompt(candidate: Any, side: Any, waited_s: float, s: Any) -> None:
    candidate.queue_s = s.weigh_queue * side.queue_s
    candidate.prefill_s = s.weigh_prefill * side.charged_s
    candidate.crowding_s = side.crowding_s
    candidate.host_tier_s = side.load_s
    candidate.ready_in_s = side.ready_s
    candidate.compute_s = side.compute_s + side.load_s
    candidate.ttft_s = waited_s + side.ready_s
    candidate.uncached_tokens = side.uncached_tokens
    candidate.held_tokens = side.held_tokens


@inner
def offer_pairs(
    rows: Any, links: Any, classes: Any, q: Any, s: Any, sides: Any, p_keys: Any, d_keys: Any, p_order: Any,
    d_order: Any, hide: bool, not_prefill: int, not_decode: int, top: Any, count: int,
) -> Any:  # fmt: skip
    """Price pairs, most promising first, until no other can enter the list; return how many candidates it holds."""
    last = top.shape[0] - 1
    for p in p_order:
        if count > last and p_keys[p] + d_keys[d_order[0]] >= top[last].total_s:
            break
        if p == not_prefill:
            continue
        prompt = sides[p]
        for d in d_order:
            if count > last and p_keys[p] + d_keys[d] >= top[last].total_s:
                break
            if d == not_decode:
                continue
            decode = sides[d]
            hidden_s = prompt.compute_s if hide else 0.0
            exposed_s, whole_s = transfer_seconds(rows, links, classes, p, d, decode.raw_bytes, hidden_s, q, s)
            ends_s = q.waited_s + prompt.ready_s + exposed_s + decode.room_s + decode.steps_s
            late_s = s.slo_weight * max(0.0, ends_s - q.slo_deadline_s)
            moved_s = s.weigh_transfer * exposed_s
            at = _insert(top, count, p_keys[p] + decode.decode_cost_s + moved_s + late_s + jitter_s(q.seed, d))
            if at < 0:
                continue
            count = min(count + 1, last + 1)
            one = top[at]
            _fill_prompt(one, prompt, q.waited_s, s)
            one.transfer_s = moved_s
            one.decode_s = s.weigh_decode * (decode.steps_s + decode.room_s)
            one.slo_s = prompt.ttft_slo_s + decode.tpot_slo_s + late_s
            one.affinity_s = prompt.affinity_s + decode.affinity_s
            one.handicap_s = 0.0
            one.tpot_s = decode.tpot_s
            one.transfer_total_s = whole_s
            one.room_s = decode.room_s
            one.decode_held_tokens = decode.decode_held_tokens
            one.mode, one.prefill, one.decode = _REMOTE, p, d
    return count


@inner
def price_alone(worker: Any, side: Any, q: Any, s: Any) -> Any:
    """Return (decode, slo, seconds per step, sum of terms) of one worker that does it all.

    A prompt stops everybody who decodes on the same worker. What it does to them, others will do to it: so the wait is
    in its own seconds per step, too, and the targets that it breaks are theirs as well.
    """
    is_prefill = worker.role == _PREFILL
    slower = s.colocated_slowdown if is_prefill else 1.0
    running = 0.0 if is_prefill else worker.running
    steps_s = slower * side.steps_s
    tpot_s = 0.0
    if q.needs_decode:
        tpot_s = slower * side.tpot_s + min(1.0, running) * side.compute_s / q.steps
    decode_s = s.weigh_decode * (steps_s + side.room_s + s.stall_weight * running * side.compute_s)
    ends_s = q.waited_s + side.ready_s + side.room_s + steps_s
    slow_s = q.steps * max(0.0, tpot_s - q.slo_tpot_s) * (1.0 + s.stall_weight * running)
    slo_s = side.ttft_slo_s + s.slo_weight * (slow_s + max(0.0, ends_s - q.slo_deadline_s))
    prompt_s = s.weigh_queue * side.queue_s + s.weigh_prefill * side.charged_s + side.crowding_s + side.load_s
    return decode_s, slo_s, tpot_s, prompt_s + decode_s + slo_s


@inner
def price_all_alone(
    rows: Any, q: Any, s: Any, sides: Any, prefills: Any, decodes: Any, found: Any, can_pair: bool, totals: Any,
    modes: Any, handicaps: Any,
) -> None:  # fmt: skip
    """Fill the totals of every worker that may do it all; what may not stays infinite."""
    lone_prefill = not found.has_decode_pool or not q.needs_decode
    needs_nobody = not found.has_prefill_pool and (s.allow_colocated or not q.needs_decode)
    for p in prefills:
        totals[p] = np.inf
        if (s.allow_colocated and (can_pair or lone_prefill or not s.allow_remote)) or not q.needs_decode:
            modes[p] = _COLOCATED
            handicaps[p] = (
                0.0
                if lone_prefill or not s.allow_remote
                else s.handicap_ratio * price_alone(rows[p], sides[p], q, s)[3]
            )
            totals[p] = price_alone(rows[p], sides[p], q, s)[3] + sides[p].affinity_s + handicaps[p]
    for d in decodes:
        totals[d] = np.inf
        side = sides[d]
        is_short = side.uncached_tokens <= s.local_max_tokens
        handicaps[d] = 0.0
        if found.is_late:
            continue  # nobody decodes now
        if s.allow_local and is_short and side.held_tokens >= max(1.0, s.local_min_held_ratio * q.prompt_tokens):
            modes[d] = _LOCAL
        elif needs_nobody or (s.allow_colocated and (can_pair or not s.allow_remote)):
            modes[d] = _COLOCATED
        else:
            continue
        terms_s = price_alone(rows[d], side, q, s)[3]
        if modes[d] == _COLOCATED and found.has_prefill_pool and s.allow_remote:
            handicaps[d] = s.handicap_ratio * terms_s
        totals[d] = terms_s + side.affinity_s + handicaps[d]


@inner
def offer_alone(
    rows: Any, q: Any, s: Any, sides: Any, members: Any, totals: Any, modes: Any, handicaps: Any, not_prompt: int,
    not_decode: int, top: Any, count: int,
) -> Any:  # fmt: skip
    """Offer workers that do it all; return how many candidates the list holds."""
    last = top.shape[0] - 1
    for slot in members:
        if slot in (not_prompt, not_decode) or totals[slot] == np.inf:
            continue
        if count > last and totals[slot] >= top[last].total_s:
            continue
        at = _insert(top, count, totals[slot] + jitter_s(q.seed, slot))
        if at < 0:
            continue
        count = min(count + 1, last + 1)
        side, one = sides[slot], top[at]
        _fill_prompt(one, side, q.waited_s, s)
        one.decode_s, one.slo_s, one.tpot_s, _ = price_alone(rows[slot], side, q, s)
        one.transfer_s, one.transfer_total_s = 0.0, 0.0
        one.room_s = side.room_s
        one.affinity_s, one.handicap_s = side.affinity_s, handicaps[slot]
        one.decode_held_tokens = side.held_tokens
        one.mode = modes[slot]
        one.prefill, one.decode = (slot, -1) if rows[slot].role == _PREFILL else (-1, slot)
    return count


@inner
def orders_by_layout(
    rows: Any, prefills: Any, decodes: Any, p_keys: Any, d_keys: Any, limit: int, p_order: Any, d_order: Any, ends: Any
) -> Any:
    """Write the cheapest of both roles, layout after layout; return the number of layouts, and where each ends."""
    layouts = np.empty(_MAX_LAYOUTS, np.int64)
    num_layouts = 0
    for p in prefills:
        is_new = num_layouts < _MAX_LAYOUTS
        for idx in range(num_layouts):
            is_new &= layouts[idx] != rows[p].layout
        if is_new:
            layouts[num_layouts] = rows[p].layout
            num_layouts += 1
    heap = np.empty(max(prefills.shape[0], decodes.shape[0]), np.int64)
    ends[0, 0] = ends[0, 1] = 0
    for idx in range(num_layouts):
        ends[idx + 1, 0] = cheapest(rows, p_keys, prefills, layouts[idx], limit, heap, p_order, ends[idx, 0])
        ends[idx + 1, 1] = cheapest(rows, d_keys, decodes, layouts[idx], limit, heap, d_order, ends[idx, 1])
    return num_layouts


@compiled
def search(
    rows: Any, links: Any, classes: Any, query: Any, settings: Any, sides: Any, prefills: Any, decodes: Any, out: Any,
    top: Any,
) -> None:  # fmt: skip
    """Fill `top` with the cheapest placements, cheapest first; `out` with their number and how sure the first is."""
    q, s, found = query[0], settings[0], out[0]
    prefills = prefills[: found.num_prefill]
    decodes = decodes[: found.num_decode]
    num_slots = rows.shape[0]
    p_keys, d_keys, totals = np.empty(num_slots), np.empty(num_slots), np.empty(num_slots)
    modes, handicaps = np.zeros(num_slots, np.int64), np.zeros(num_slots)
    hidden_s = 0.0
    for p in prefills:
        p_keys[p] = sides[p].prompt_cost_s + jitter_s(q.seed, p)
        hidden_s = max(hidden_s, sides[p].compute_s)
    for d in decodes:  # no link can be better than this
        wire_s = sides[d].raw_bytes / s.best_bytes_per_s
        moved_s = s.least_residual * (s.least_rtt_s + max(s.tail_ratio * wire_s, wire_s - hidden_s))
        d_keys[d] = sides[d].decode_cost_s + s.weigh_transfer * moved_s + jitter_s(q.seed, d)
    is_fixed = q.fixed_prefill >= 0 or q.fixed_decode >= 0
    can_pair = q.needs_decode and (s.allow_remote or is_fixed) and prefills.shape[0] > 0 and decodes.shape[0] > 0
    p_order, d_order = np.empty(prefills.shape[0], np.int64), np.empty(decodes.shape[0], np.int64)
    ends = np.empty((_MAX_LAYOUTS + 1, 2), np.int64)
    num_layouts = 0
    if can_pair:
        limit = s.candidates_per_role
        num_layouts = orders_by_layout(rows, prefills, decodes, p_keys, d_keys, limit, p_order, d_order, ends)
    if not is_fixed:
        price_all_alone(rows, q, s, sides, prefills, decodes, found, can_pair, totals, modes, handicaps)
    one = np.empty(1, CANDIDATE)
    found.next_prefill_s = found.next_decode_s = np.inf
    prompt_at, decode_at = _NOBODY, _NOBODY
    for turn in range(3):  # the list; the best that spares the winner the prompt; the best that spares it the decoding
        room = top if turn == 0 else one
        not_prompt = prompt_at if turn == 1 else _NOBODY
        not_decode = decode_at if turn == 2 else _NOBODY
        count = _ZERO
        for idx in range(num_layouts):
            if ends[idx + 1, 1] > ends[idx, 1]:
                count = offer_pairs(
                    rows, links, classes, q, s, sides, p_keys, d_keys, p_order[ends[idx, 0] : ends[idx + 1, 0]],
                    d_order[ends[idx, 1] : ends[idx + 1, 1]], not found.is_late, not_prompt, not_decode, room, count,
                )  # fmt: skip
        if not is_fixed:
            for is_decode in range(2):
                members = decodes if is_decode else prefills
                count = offer_alone(
                    rows, q, s, sides, members, totals, modes, handicaps, not_prompt, not_decode, room, count
                )
        if turn == 0:
            found.num_candidates = count
            if count == 0:
                return
            best = top[0]
            prompt_at = best.prefill if best.prefill >= 0 else best.decode
            decode_at = best.decode if best.decode >= 0 else best.prefill
        elif count and turn == 1:
            found.next_prefill_s = one[0].total_s
        elif count:
            found.next_decode_s = one[0].total_s
    found.is_tie = found.num_candidates > 1 and top[1].total_s - top[0].total_s <= 2.0 * TIE_S
    found.has_longest_prefix, has_other = top[0].held_tokens > 0.0, False
    for position in range(1, found.num_candidates):
        if top[position].prefill != top[0].prefill:
            has_other = True
            found.has_longest_prefix &= top[position].held_tokens < top[0].held_tokens
    found.has_longest_prefix &= has_other
    bound(rows[prompt_at], rows[decode_at], q, s, top[0].total_s, found)


@inner
def bound(prompt: Any, decode: Any, q: Any, s: Any, total_s: float, found: Any) -> None:
    """Fill how much busier the winner's workers may be than thought before the next best would have won."""
    found.prefill_slack_s = max(0.0, found.next_prefill_s - total_s) + s.submit_slack_s
    found.decode_slack_s = max(0.0, found.next_decode_s - total_s) + s.submit_slack_s
    found.max_queued_tokens = found.max_requests_held = -1
    if found.prefill_slack_s < np.inf and q.fixed_prefill < 0:
        waiting = max(0.0, prompt.queued_tokens - max(0.0, q.now - prompt.reported_at) / prompt.s_per_token)
        waiting += prompt.credit_prefill_tokens + prompt.peer_prefill_tokens
        found.max_queued_tokens = int(waiting + min(found.prefill_slack_s / prompt.s_per_token, 1e15))
    if found.decode_slack_s < np.inf and q.needs_decode and q.fixed_decode < 0:
        held = decode.requests + decode.credit_requests + decode.peer_requests
        each_s = q.steps * (decode.decode_c1 + decode.decode_c2 * q.prompt_tokens)
        found.max_requests_held = int(min(held + found.decode_slack_s / max(each_s, TIE_S), 2147483647.0))
