"""The states of a request in the gateway and every way between them, as one table. `router.state` walks it.

1. RECEIVED; admission takes it: QUEUED. Its turn comes: ROUTING, the policy is asked.
2. The policy's answer decides how it is served (`router.routing.modes`):
   - a pair: RESERVING, the decode worker is asked to reserve blocks. It accepts: DISPATCHING, the prefill worker is
     asked. It accepts: PREFILLING, and the request leaves the queue.
   - a prefill worker now, a decode worker later: STARTING, the first is asked. It accepts: SEEKING, it computes
     while a decode worker is looked for; BINDING, one is asked to reserve. It accepts and the prefill worker is told:
     PREFILLING, as above.
   - one worker alone: ENGAGING, it is asked. It accepts: COMPUTING; its first token: GENERATING until FINISHED.
3. A refusal asks somebody else: other workers (ROUTING), or, once a decode worker has accepted, another prefill worker
   for it under the same transfer id (REROUTING). With nobody left to ask it is QUEUED again, in its old place.
4. The prefill worker's token goes to the client: HANDING_OVER until either worker tells that the KV arrived, then
   DECODING until FINISHED. Or the first token was the last. The two workers' streams are not ordered against each
   other: news of the decode worker that comes before the first token is kept until that is here. (Even that the
   transfer was cancelled: when the first token is the last, the decode worker may be the first to tell.) How computing
   went is told right before the first token: once the KV has landed, nobody listens to the prefill worker any more.
5. The first token came and no decode worker is bound: HOLDING, the KV waits at the prefill worker; PLACING, a decode
   worker is asked. In the end the prefill worker generates the rest itself: GENERATING.
6. A worker that is lost before the first token costs an attempt, at most `max_losses` of them (a prompt that kills
   workers must not kill the pool). After the first token it ends the request: FAILED with UNAVAILABLE. A decode worker
   that was only being asked is replaced at any time.
7. Whatever ends it early, both workers are told to free what they hold.
"""

from collections.abc import Mapping
from enum import StrEnum

from router import messages as m


class RequestState(StrEnum):
    RECEIVED = "received"
    QUEUED = "queued"
    ROUTING = "routing"
    RESERVING = "reserving"
    DISPATCHING = "dispatching"
    REROUTING = "rerouting"
    STARTING = "starting"
    SEEKING = "seeking"
    BINDING = "binding"
    PREFILLING = "prefilling"
    HOLDING = "holding"
    PLACING = "placing"
    HANDING_OVER = "handing_over"
    DECODING = "decoding"
    ENGAGING = "engaging"
    COMPUTING = "computing"
    GENERATING = "generating"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


S = RequestState
TERMINAL = frozenset({S.FINISHED, S.FAILED, S.ABORTED})
ASKING = frozenset({S.RESERVING, S.DISPATCHING, S.STARTING, S.BINDING, S.PLACING, S.ENGAGING})  # an answer is due
ALL_EVENTS: tuple[type[m.Event], ...] = m.Event.__args__
EARLY_NEWS: tuple[type[m.Event], ...] = (m.KvLanded, m.DecodeProduced, m.DecodeFinished, m.TransferCancelled)
_ENDS: Mapping[type[m.Event], RequestState] = {m.RequestFailed: S.FAILED, m.AbortRequested: S.ABORTED}

EDGES: Mapping[RequestState, Mapping[type[m.Event], RequestState]] = {
    S.RECEIVED: {m.Queued: S.QUEUED, **_ENDS},
    S.QUEUED: {m.Released: S.ROUTING, **_ENDS},
    S.ROUTING: {
        m.PairChosen: S.RESERVING,
        m.LateChosen: S.STARTING,
        m.PrefillAloneChosen: S.ENGAGING,
        m.DecodeAloneChosen: S.ENGAGING,
        m.NothingFits: S.QUEUED,
        **_ENDS,
    },
    S.RESERVING: {
        m.DecodeAccepted: S.DISPATCHING,
        m.DecodeRejected: S.ROUTING,
        m.DecodeLost: S.ROUTING,
        **_ENDS,
    },
    S.DISPATCHING: {
        m.PrefillAccepted: S.PREFILLING,
        m.PrefillRejected: S.REROUTING,  # it kept nothing: the reservation and its transfer id stay good
        m.PrefillLost: S.ROUTING,  # it may have offered the transfer already: the id is spent
        m.DecodeLost: S.ROUTING,
        **dict.fromkeys(EARLY_NEWS, S.DISPATCHING),  # kept: it overtook the prefill worker's answer
        **_ENDS,
    },
    S.REROUTING: {
        m.PrefillChosen: S.DISPATCHING,
        m.NothingFits: S.QUEUED,
        m.DecodeLost: S.ROUTING,
        **_ENDS,
    },
    S.STARTING: {
        m.PrefillAccepted: S.SEEKING,
        m.PrefillRejected: S.ROUTING,
        m.PrefillLost: S.ROUTING,
        **_ENDS,
    },
    S.SEEKING: {
        m.DecodeChosen: S.BINDING,
        m.DecodeUnavailable: S.SEEKING,
        m.SeekDue: S.SEEKING,
        m.PrefillMeasured: S.SEEKING,  # right before the first token
        m.PrefillProduced: S.HOLDING,
        m.PrefillFinished: S.FINISHED,  # the first token was the last
        m.PrefillLost: S.ROUTING,
        **_ENDS,
    },
    S.BINDING: {
        m.DecodeAccepted: S.PREFILLING,
        m.DecodeRejected: S.SEEKING,
        m.DecodeLost: S.SEEKING,  # nothing was sent to it: the prompt is computed all the same
        m.PrefillMeasured: S.BINDING,
        m.PrefillProduced: S.PLACING,
        m.PrefillFinished: S.FINISHED,
        m.PrefillLost: S.ROUTING,
        **_ENDS,
    },
    S.PREFILLING: {
        m.PrefillMeasured: S.PREFILLING,
        m.PrefillProduced: S.HANDING_OVER,
        m.PrefillFinished: S.FINISHED,
        m.PrefillLost: S.ROUTING,
        m.DecodeLost: S.ROUTING,
        **dict.fromkeys(EARLY_NEWS, S.PREFILLING),  # kept: it overtook the first token
        **_ENDS,
    },
    S.HOLDING: {
        m.DecodeChosen: S.PLACING,
        m.DecodeUnavailable: S.HOLDING,
        m.SeekDue: S.HOLDING,
        m.PrefillMeasured: S.HOLDING,
        m.HoldExpired: S.GENERATING,  # its client has waited long enough
        m.PrefillLost: S.FAILED,
        **_ENDS,
    },
    S.PLACING: {
        m.DecodeAccepted: S.HANDING_OVER,
        m.DecodeRejected: S.HOLDING,
        m.DecodeLost: S.HOLDING,
        m.PrefillMeasured: S.PLACING,
        m.PrefillLost: S.FAILED,
        **_ENDS,
    },
    S.HANDING_OVER: {
        m.PrefillMeasured: S.HANDING_OVER,
        m.KvHandedOver: S.DECODING,  # either news may be the first
        m.KvLanded: S.DECODING,
        m.PrefillLost: S.FAILED,
        m.TransferCancelled: S.FAILED,
        m.DecodeLost: S.FAILED,
        **_ENDS,
    },
    S.DECODING: {
        m.PrefillMeasured: S.DECODING,
        m.KvHandedOver: S.DECODING,
        m.KvLanded: S.DECODING,
        m.PrefillLost: S.DECODING,  # it holds nothing of the request any more
        m.DecodeProduced: S.DECODING,
        m.DecodeFinished: S.FINISHED,
        m.DecodeLost: S.FAILED,
        **_ENDS,
    },
    S.ENGAGING: {
        m.PrefillAccepted: S.COMPUTING,
        m.DecodeAccepted: S.COMPUTING,
        m.PrefillRejected: S.ROUTING,
        m.DecodeRejected: S.ROUTING,
        m.PrefillLost: S.ROUTING,
        m.DecodeLost: S.ROUTING,
        **_ENDS,
    },
    S.COMPUTING: {
        m.PrefillMeasured: S.COMPUTING,
        m.PrefillProduced: S.GENERATING,
        m.DecodeProduced: S.GENERATING,
        m.PrefillFinished: S.FINISHED,
        m.DecodeFinished: S.FINISHED,
        m.PrefillLost: S.ROUTING,
        m.DecodeLost: S.ROUTING,
        **_ENDS,
    },
    S.GENERATING: {
        m.PrefillMeasured: S.GENERATING,
        m.PrefillProduced: S.GENERATING,
        m.DecodeProduced: S.GENERATING,
        m.PrefillFinished: S.FINISHED,
        m.DecodeFinished: S.FINISHED,
        m.PrefillLost: S.FAILED,
        m.DecodeLost: S.FAILED,
        **_ENDS,
    },
    # Whatever comes after the end is late news of it.
    S.FINISHED: dict.fromkeys(ALL_EVENTS, S.FINISHED),
    S.FAILED: dict.fromkeys(ALL_EVENTS, S.FAILED),
    S.ABORTED: dict.fromkeys(ALL_EVENTS, S.ABORTED),
}
