"""The account of a request that ended well: who served it, how, when, and what had been expected."""

from core.request import Finish
from router.in_flight import ActiveRequest
from router.routing.modes import Binding, Mode, ModeReason
from router.stream import Completion, Placement


def complete(active: ActiveRequest, finish: Finish, now: float) -> Completion:
    """Pure reading."""
    machine, request = active.machine, active.request
    return Completion(
        finish=finish,
        prompt_tokens=request.num_prompt_tokens,
        completion_tokens=machine.num_tokens,
        cached_tokens=machine.cached_tokens,
        timing=machine.timeline.split(machine.num_tokens, now),
        landed=machine.landed,
        placement=_placement(active),
        num_asked=machine.num_asked,
    )


def _placement(active: ActiveRequest) -> Placement:
    machine, decision = active.machine, active.decision
    assert decision is not None, "somebody served it"
    mode, mode_reason = decision.mode, decision.mode_reason
    if machine.is_kept:  # nobody took over the decoding
        mode, mode_reason = Mode.COLOCATED, ModeReason.NO_DECODE_POOL
    return Placement(
        prefill_worker=machine.prefill_worker,
        decode_worker=machine.decode_worker,
        reason=decision.reason,
        mode=mode,
        mode_reason=mode_reason,
        binding=(Binding.LATE if machine.is_late else Binding.EARLY) if mode is Mode.REMOTE_PREFILL else None,
        predicted_ttft_s=decision.ttft_s,
        predicted_tpot_s=decision.tpot_s,
        staleness_s=decision.staleness_s,
    )
