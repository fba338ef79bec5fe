"""A request with a prefill and a decode worker: its good life, refusals, losses, news that overtake each other."""

import pytest

from core.errors import ProtocolError, RejectReason, WorkerLost
from core.ids import WorkerId
from router import messages as m
from router.lifecycle import RequestState
from tests.fakes.request_life import (
    D1,
    D2,
    END,
    LANDED,
    LOST,
    NOBODY,
    P1,
    P2,
    SCORES,
    TO,
    S,
    at,
    facts,
    freed,
    machine,
    rejected,
    tokens,
    walk,
)


def test_a_good_life() -> None:
    request = machine()
    steps: list[tuple[m.Event, RequestState, list[m.Effect]]] = [
        (m.Queued(), S.QUEUED, []),
        (m.Released(), S.ROUTING, [m.ChooseWorkers(frozenset())]),
        (m.PairChosen(P1, D1), S.RESERVING, [m.SubmitDecode(D1, P1, 0, True)]),
        (m.DecodeAccepted(0), S.DISPATCHING, [m.SubmitPrefill(P1, D1, 0, True)]),
        (m.PrefillAccepted(3), S.PREFILLING, [m.LeaveQueue()]),
        (m.PrefillProduced(tokens(0)), S.HANDING_OVER, [m.Deliver(tokens(0))]),
        (m.PrefillMeasured(0.1, 0.2, 4), S.HANDING_OVER, []),
        (m.KvHandedOver(), S.DECODING, [m.ReleaseWorker(P1)]),
        (LANDED, S.DECODING, []),
        (m.DecodeProduced(tokens(1, 2)), S.DECODING, [m.Deliver(tokens(1, 2))]),
        (m.PrefillLost(LOST), S.DECODING, []),
        (
            m.DecodeFinished(tokens(3), END),
            S.FINISHED,
            [m.Deliver(tokens(3)), m.ReleaseWorker(D1), m.Conclude(finish=END)],
        ),
    ]
    for now, (event, state, effects) in enumerate(steps):
        assert request.handle(event, float(now)) == effects
        assert request.state is state
        request.check()
    assert (request.num_tokens, request.cached_tokens, request.num_asked) == (4, 4, 1)
    assert (request.prefill_worker, request.decode_worker, request.landed) == (P1, D1, LANDED)
    split = request.timeline.split(4, 20.0)
    assert (split.queue_s, split.route_s, split.prefill_s, split.ttft_s, split.total_s) == (1.0, 3.0, 1.0, 5.0, 20.0)
    assert split.tpot_s == pytest.approx((11.0 - 5.0) / 3)


def test_a_transfer_cancelled_because_the_first_token_is_the_last_is_no_loss() -> None:
    cancelled = m.TransferCancelled(WorkerLost("cancelled: LastTokenComputed"))
    request, effects = walk(*TO[S.PREFILLING], cancelled)
    assert (request.state, effects) == (S.PREFILLING, [])
    request, effects = walk(m.PrefillFinished(tokens(0), END), start=request)
    assert request.state is S.FINISHED
    assert effects[0] == m.Deliver(tokens(0))
    assert effects[-1] == m.Conclude(finish=END)
    assert request.num_asked == 1


def test_a_transfer_cancelled_for_another_reason_is_what_the_prefill_worker_says() -> None:
    cancelled = m.TransferCancelled(WorkerLost("cancelled: EngineFailed"))
    request, _ = walk(*TO[S.PREFILLING], cancelled)
    _, effects = walk(m.PrefillLost(LOST), start=request)
    assert effects[-1] == m.ChooseWorkers(frozenset({P1})), "tried elsewhere; the decode worker is not to blame"
    request, _ = walk(*TO[S.PREFILLING], cancelled)
    _, effects = walk(m.PrefillProduced(tokens(0)), start=request)
    assert request.state is S.FAILED, "after the first token nothing is tried again"
    assert effects[-1] == m.Conclude(error=cancelled.error)


@pytest.mark.parametrize("state", [S.PREFILLING, S.SEEKING, S.BINDING, S.COMPUTING])
def test_what_was_cached_is_known_when_the_first_token_is_the_last(state: RequestState) -> None:
    request, effects = walk(*TO[state], m.PrefillMeasured(0.1, 0.2, 48))
    assert effects == []
    assert request.state is state
    is_alone = state is S.COMPUTING
    end = m.DecodeFinished(tokens(0), END) if is_alone else m.PrefillFinished(tokens(0), END)
    walk(end, start=request)
    assert (request.state, request.cached_tokens) == (S.FINISHED, 48)


@pytest.mark.parametrize(
    "first",
    [
        (*TO[S.PREFILLING], m.PrefillProduced(tokens(0), SCORES)),
        (*TO[S.PREFILLING], m.PrefillFinished(tokens(0), END, SCORES)),
        (*TO[S.SEEKING], m.PrefillProduced(tokens(0), SCORES)),
        (*TO[S.COMPUTING], m.DecodeProduced(tokens(0), SCORES)),
        (*TO[S.COMPUTING], m.DecodeFinished(tokens(0), END, SCORES)),
    ],
    ids=["pair", "pair, last token", "late", "alone", "alone, last token"],
)
def test_a_scored_prompt_goes_out_with_the_first_token(first: tuple[m.Event, ...]) -> None:
    _, effects = walk(*first)
    assert effects[0] == m.Deliver(tokens(0), SCORES)


def test_a_scored_prompt_that_is_lost_with_its_worker_is_told_once_by_the_next() -> None:
    request, _ = walk(*TO[S.PREFILLING], m.PrefillLost(LOST))
    again = (m.PairChosen(P2, D2), m.DecodeAccepted(0), m.PrefillAccepted(0))
    _, effects = walk(*again, m.PrefillProduced(tokens(0), SCORES), start=request)
    assert effects == [m.Deliver(tokens(0), SCORES)]


def test_a_first_token_that_ends_the_request_frees_the_decode_worker() -> None:
    _, effects = walk(*TO[S.PREFILLING], m.PrefillFinished(tokens(0), END))
    assert effects == [
        m.Deliver(tokens(0)),
        m.AbortWork(D1, "the first token was the last"),
        m.ReleaseWorker(P1),
        m.Conclude(finish=END),
    ]


def test_a_refusal_asks_others_and_remembers_who_refused() -> None:
    request, effects = walk(*TO[S.RESERVING], m.DecodeRejected(rejected()))
    assert effects == [m.ReleaseWorker(P1), m.ReleaseWorker(D1), m.ChooseWorkers(frozenset({D1}))]
    request, effects = walk(m.PairChosen(P1, D2), m.DecodeAccepted(0), start=request)
    assert effects == [m.SubmitPrefill(P1, D2, 1, True)], "another reservation, another attempt"
    request, effects = walk(m.PrefillRejected(rejected()), start=request)
    assert effects == [m.ReleaseWorker(P1), m.ChoosePrefill(frozenset({D1, P1}), D2)]
    request, effects = walk(m.PrefillChosen(P2), start=request)
    assert effects == [m.SubmitPrefill(P2, D2, 1, True)], "the reservation and its transfer id stay"
    assert request.num_asked == 3


def test_with_nobody_left_it_waits_with_the_longest_hint_and_starts_afresh() -> None:
    request, _ = walk(*TO[S.RESERVING], m.DecodeRejected(rejected(retry_after_s=0.5)))
    request, effects = walk(NOBODY, start=request)
    assert effects == [m.ReturnToQueue("decode: refused", 0.5)]
    request, effects = walk(m.Released(), start=request)
    assert effects == [m.ChooseWorkers(frozenset())], "who refused a while ago may accept now"


def test_with_no_prefill_worker_left_the_reservation_is_given_back() -> None:
    request, effects = walk(*TO[S.REROUTING], NOBODY)
    assert request.state is S.QUEUED
    assert isinstance(effects[0], m.AbortWork)
    assert effects[0].worker_id == D1


@pytest.mark.parametrize("state", [S.DISPATCHING, S.PREFILLING])
@pytest.mark.parametrize(("event", "culprit"), [(m.PrefillLost(LOST), P1), (m.DecodeLost(LOST), D1)])
def test_a_worker_lost_before_the_first_token_costs_an_attempt(
    state: RequestState, event: m.Event, culprit: WorkerId
) -> None:
    request, effects = walk(*TO[state], event)
    assert request.state is S.ROUTING
    assert [type(effect) for effect in effects] == [m.AbortWork, m.AbortWork, m.ChooseWorkers]
    assert effects[-1] == m.ChooseWorkers(frozenset({culprit}))


def test_losses_are_bounded() -> None:
    request = machine(max_losses=1)
    walk(*TO[S.PREFILLING], m.PrefillLost(LOST), start=request)
    _, effects = walk(m.PairChosen(P2, D1), m.DecodeAccepted(0), m.PrefillLost(WorkerLost("again")), start=request)
    assert request.state is S.FAILED
    assert isinstance(effects[-1], m.Conclude)
    assert str(effects[-1].error) == "again"


@pytest.mark.parametrize(
    ("state", "event", "told"),
    [
        (S.HANDING_OVER, m.PrefillLost(LOST), [P1, D1]),
        (S.HANDING_OVER, m.DecodeLost(LOST), [P1, D1]),
        (S.DECODING, m.DecodeLost(LOST), [D1]),
    ],
)
def test_a_worker_lost_after_the_first_token_ends_the_request(
    state: RequestState, event: m.Event, told: list[WorkerId]
) -> None:
    request, effects = walk(*TO[state], event)
    assert request.state is S.FAILED
    assert freed(effects) == told
    assert effects[-1] == m.Conclude(error=LOST)


@pytest.mark.parametrize("early", [S.DISPATCHING, S.PREFILLING])
def test_news_that_overtakes_the_first_token_waits_for_it(early: RequestState) -> None:
    request = at(early)
    walk(LANDED, m.DecodeProduced(tokens(1)), m.DecodeFinished(tokens(2), END), start=request)
    assert request.state is early
    if early is S.DISPATCHING:
        walk(m.PrefillAccepted(0), start=request)
    _, effects = walk(m.PrefillProduced(tokens(0)), start=request)
    assert [effect.tokens for effect in effects if isinstance(effect, m.Deliver)] == [tokens(0), tokens(1), tokens(2)]
    assert effects[-1] == m.Conclude(finish=END)
    assert request.state is S.FINISHED


def test_early_news_of_a_lost_attempt_is_forgotten() -> None:
    request = at(S.PREFILLING)
    walk(LANDED, m.DecodeProduced(tokens(1)), m.PrefillLost(LOST), start=request)
    again = (m.PairChosen(P2, D2), m.DecodeAccepted(0), m.PrefillAccepted(0))
    _, effects = walk(*again, m.PrefillProduced(tokens(0)), start=request)
    assert effects == [m.Deliver(tokens(0))]
    assert request.state is S.HANDING_OVER


BROKEN: list[tuple[str, RequestState, m.Event]] = [
    ("gap", S.DECODING, m.DecodeProduced(tokens(2))),
    ("repeat", S.DECODING, m.DecodeProduced(tokens(0))),
    ("gap-inside", S.DECODING, m.DecodeProduced(tokens(1, 3))),
    ("first-is-not-0", S.PREFILLING, m.PrefillProduced(tokens(1))),
    ("nothing-produced", S.PREFILLING, m.PrefillProduced(())),
    ("end-with-a-gap", S.DECODING, m.DecodeFinished(tokens(5), END)),
    ("early-tokens-before-the-landing", S.PREFILLING, m.DecodeProduced(tokens(1))),
]


@pytest.mark.parametrize(("state", "event"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_token_streams_are_refused_and_change_nothing(state: RequestState, event: m.Event) -> None:
    request = at(state)
    before = facts(request)
    with pytest.raises(ProtocolError):
        request.handle(event, 50.0)
    assert facts(request) == before


def test_early_tokens_are_checked_when_they_come() -> None:
    request = at(S.PREFILLING)
    walk(LANDED, start=request)
    for event in (m.DecodeProduced(tokens(2)), LANDED):
        with pytest.raises(ProtocolError):
            request.handle(event, 9.0)


def test_a_first_delivery_that_early_tokens_do_not_follow_changes_nothing() -> None:
    request = at(S.PREFILLING)
    walk(LANDED, m.DecodeProduced(tokens(1)), start=request)
    before = facts(request)
    with pytest.raises(ProtocolError):
        request.handle(m.PrefillProduced(tokens(0, 1)), 9.0)
    assert facts(request) == before
    _, effects = walk(m.RequestFailed(LOST), start=request)
    assert freed(effects) == [P1, D1]


def test_too_long_is_told_from_busy() -> None:
    request, _ = walk(*TO[S.RESERVING], m.DecodeRejected(rejected(RejectReason.TOO_LONG)))
    assert request.is_too_long
    request, _ = walk(m.PairChosen(P1, D2), m.DecodeRejected(rejected()), start=request)
    assert not request.is_too_long
