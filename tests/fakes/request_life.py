"""The life of one request for tests of its machine: a sample of every event, and a way into every state."""

from collections.abc import Sequence

from core.errors import Aborted, RejectedError, RejectReason, ServingError, WorkerLost
from core.ids import RequestId, WorkerId
from core.request import Finish, FinishReason, PromptToken, TokenOutput
from router import messages as m
from router.lifecycle import RequestState
from router.patience import Patience
from router.state import RequestMachine

S = RequestState
P1, P2, D1, D2 = (WorkerId(name) for name in ("p1", "p2", "d1", "d2"))
END = Finish(FinishReason.LENGTH)
SCORES = (PromptToken(1, None), PromptToken(2, -0.5))
LOST = WorkerLost("gone")
LANDED = m.KvLanded(0.1, 0.2, 0, 10, 1000, "none", kv_lossless=True, kv_wire_bytes=1100)
NOBODY = m.NothingFits("decode: refused")


def machine(*, deadline_at: float = 100.0, max_losses: int = 2) -> RequestMachine:
    patience = Patience(deadline_at=deadline_at, accept_timeout_s=2.0, hold_timeout_s=20.0)
    return RequestMachine(RequestId("r"), arrived_at=0.0, patience=patience, max_losses=max_losses)


def tokens(*indices: int) -> tuple[TokenOutput, ...]:
    return tuple(TokenOutput(index, 7) for index in indices)


def rejected(reason: RejectReason = RejectReason.QUEUE_FULL, retry_after_s: float = 0.0) -> RejectedError:
    return RejectedError(reason, "", retry_after_s)


BUSIER = rejected(RejectReason.BUSIER)
FAILURE = m.RequestFailed(ServingError("no"))
ABORT = m.AbortRequested(Aborted("enough"))
SAMPLES: dict[type[m.Event], m.Event] = {
    type(event): event
    for event in (
        m.Queued(),
        m.Released(),
        m.PairChosen(P1, D1),
        m.LateChosen(P1),
        m.PrefillAloneChosen(P1),
        m.DecodeAloneChosen(D1),
        m.PrefillChosen(P2),
        m.DecodeChosen(D1),
        NOBODY,
        m.DecodeUnavailable(0.5),
        m.SeekDue(),
        m.HoldExpired(),
        m.DecodeAccepted(0),
        m.DecodeRejected(rejected()),
        m.PrefillAccepted(3),
        m.PrefillRejected(rejected()),
        m.PrefillProduced(tokens(0)),
        m.PrefillFinished(tokens(0), END),
        m.PrefillMeasured(0.1, 0.2, 4),
        m.KvHandedOver(),
        LANDED,
        m.DecodeProduced(tokens(1)),
        m.DecodeFinished(tokens(1), END),
        m.PrefillLost(LOST),
        m.DecodeLost(LOST),
        m.TransferCancelled(LOST),
        FAILURE,
        ABORT,
    )
}
TO: dict[RequestState, Sequence[m.Event]] = {S.RECEIVED: (), S.QUEUED: (m.Queued(),)}
TO[S.ROUTING] = (*TO[S.QUEUED], m.Released())
TO[S.RESERVING] = (*TO[S.ROUTING], m.PairChosen(P1, D1))
TO[S.DISPATCHING] = (*TO[S.RESERVING], m.DecodeAccepted(0))
TO[S.REROUTING] = (*TO[S.DISPATCHING], m.PrefillRejected(rejected()))
TO[S.PREFILLING] = (*TO[S.DISPATCHING], m.PrefillAccepted(3))
TO[S.HANDING_OVER] = (*TO[S.PREFILLING], m.PrefillProduced(tokens(0)))
TO[S.DECODING] = (*TO[S.HANDING_OVER], LANDED)
TO[S.STARTING] = (*TO[S.ROUTING], m.LateChosen(P1))
TO[S.SEEKING] = (*TO[S.STARTING], m.PrefillAccepted(3))
TO[S.BINDING] = (*TO[S.SEEKING], m.DecodeChosen(D1))
TO[S.HOLDING] = (*TO[S.SEEKING], m.PrefillProduced(tokens(0)))
TO[S.PLACING] = (*TO[S.HOLDING], m.DecodeChosen(D1))
TO[S.ENGAGING] = (*TO[S.ROUTING], m.DecodeAloneChosen(D1))
TO[S.COMPUTING] = (*TO[S.ENGAGING], m.DecodeAccepted(3))
TO[S.GENERATING] = (*TO[S.COMPUTING], m.DecodeProduced(tokens(0)))
TO[S.FINISHED] = (*TO[S.DECODING], m.DecodeFinished(tokens(1), END))
TO[S.FAILED] = (*TO[S.PREFILLING], FAILURE)
TO[S.ABORTED] = (*TO[S.PREFILLING], ABORT)
ALONE = frozenset({S.ENGAGING, S.COMPUTING, S.GENERATING})


def walk(*events: m.Event, start: RequestMachine | None = None) -> tuple[RequestMachine, list[m.Effect]]:
    """Feed events one second apart; return the machine and the last event's effects."""
    request = start or machine()
    effects: list[m.Effect] = []
    for now, event in enumerate(events):
        effects = request.handle(event, float(now))
        request.check()
    return request, effects


def at(state: RequestState) -> RequestMachine:
    request, _ = walk(*TO[state])
    assert request.state is state
    return request


def facts(request: RequestMachine) -> dict[str, object]:
    """Return all that a refused event must leave as it is."""
    plain = {name: repr(value) for name, value in vars(request).items() if name not in ("timeline", "_patience")}
    return plain | vars(request.timeline) | vars(request._patience)


def freed(effects: Sequence[m.Effect]) -> list[WorkerId]:
    """Return who was told to free the work."""
    return [effect.worker_id for effect in effects if isinstance(effect, m.AbortWork)]
