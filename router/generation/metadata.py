"""What a client is told beside the text: who served it and how, what it cost on the way, what computed it. Pure, and
only what JSON has words for: numbers, texts, lists, objects by name.

HTTP puts it under `tandem` in replies; what is known with the first token also into the headers.
"""

import math
from collections.abc import Mapping
from typing import Any

from router.generation.answer import Answer
from router.stream import Completion

HEADER_PREFIX = "x-tandem-"


def response_metadata(answer: Answer, completions: Mapping[int, Completion]) -> dict[str, Any]:
    """Return the account of a whole answer.

    Args:
        completions: of every choice that is over, by its number.
    """
    return {**_origin(answer), "choices": [_choice(index, one) for index, one in sorted(completions.items())]}


def response_headers(answer: Answer) -> dict[str, str]:
    """Return what is known with the first token, as headers: what computes the answer, and the seed to repeat it."""
    origin = _origin(answer)
    told = {"model": origin["model"], "seed": str(origin["seed"]), **origin["provenance"]}
    return {HEADER_PREFIX + name.replace("_", "-"): _ascii(text) for name, text in told.items() if text}


def _origin(answer: Answer) -> dict[str, Any]:
    provenance, first = answer.provenance, answer.requests[0]
    return {
        "request_id": first.request_id,
        "model": answer.model,
        "seed": first.sampling.seed,
        "provenance": {
            "weights_version": provenance.weights_version,
            "dtype": provenance.dtype,
            "engine_version": provenance.engine_version,
        },
    }


def _choice(index: int, completion: Completion) -> dict[str, Any]:
    """How one choice was served. Seconds; `kv` is null when no KV crossed."""
    placement, timing, landed = completion.placement, completion.timing, completion.landed
    return {
        "index": index,
        "prefill_worker": placement.prefill_worker,
        "decode_worker": placement.decode_worker,
        "mode": str(placement.mode),
        "mode_reason": str(placement.mode_reason),
        "binding": None if placement.binding is None else str(placement.binding),
        "reason": placement.reason,
        "attempts": completion.num_asked,
        "prompt_tokens": completion.prompt_tokens,
        "cached_tokens": completion.cached_tokens,
        "completion_tokens": completion.completion_tokens,
        "lossless": landed is None or landed.kv_lossless,
        "kv": None
        if landed is None
        else {
            "profile": landed.kv_profile,
            "bytes": landed.kv_bytes,
            "wire_bytes": landed.kv_wire_bytes,
            "tokens_sent": landed.kv_tokens_sent,
            "tokens_held": landed.kv_tokens_held,
        },
        "timing": {
            "queue_s": timing.queue_s,
            "route_s": timing.route_s,
            "prefill_s": timing.prefill_s,
            "ttft_s": timing.ttft_s,
            "transfer_s": 0.0 if landed is None else landed.exposed_s,
            "first_decode_s": 0.0 if landed is None else landed.first_decode_s,
            "tpot_s": timing.tpot_s,
            "total_s": timing.total_s,
        },
        "predicted": {"ttft_s": _finite(placement.predicted_ttft_s), "tpot_s": _finite(placement.predicted_tpot_s)},
        "staleness_s": _finite(placement.staleness_s),
    }


def _finite(seconds: float) -> float | None:
    """JSON has no infinity."""
    return seconds if math.isfinite(seconds) else None


def _ascii(text: str) -> str:
    """Names of models may have any characters; header values may not."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)
