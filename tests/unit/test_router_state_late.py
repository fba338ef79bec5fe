"""A request whose decode worker is found late, one that one worker does alone, and conditional questions."""

import pytest

from core.errors import RejectReason
from core.ids import WorkerId
from core.membership import Role
from router import messages as m
from router.lifecycle import RequestState
from tests.fakes.request_life import (
    BUSIER,
    D1,
    D2,
    END,
    LANDED,
    LOST,
    P1,
    P2,
    TO,
    S,
    at,
    freed,
    rejected,
    tokens,
    walk,
)

ROUTED = (m.Queued(), m.Released())


def test_a_decode_worker_is_found_while_the_prompt_is_computed() -> None:
    request, effects = walk(*ROUTED, m.LateChosen(P1))
    assert (request.state, effects) == (S.STARTING, [m.SubmitPrefill(P1, None, 0, True)])
    request, effects = walk(m.PrefillAccepted(0), start=request)
    assert effects == [m.LeaveQueue(), m.ChooseDecode(frozenset(), P1, 0)]
    request, effects = walk(m.DecodeChosen(D1), start=request)
    assert effects == [m.SubmitDecode(D1, None, 0, True)], "the transfer has the id of the prompt's work"
    request, effects = walk(m.DecodeAccepted(0), start=request)
    assert (request.state, effects) == (S.PREFILLING, [m.BindPrefill(P1, D1)])
    request, effects = walk(m.PrefillProduced(tokens(0)), m.KvHandedOver(), LANDED, start=request)
    assert (request.state, request.prefill_worker, request.decode_worker) == (S.DECODING, P1, D1)
    assert request.is_late


def test_a_refusal_asks_another_decode_worker_and_the_prompt_goes_on() -> None:
    request, effects = walk(*TO[S.BINDING], m.DecodeRejected(rejected()))
    assert effects == [m.ReleaseWorker(D1), m.ChooseDecode(frozenset({D1}), P1, 1)]
    request, effects = walk(m.DecodeUnavailable(0.5), start=request)
    assert (request.state, effects, request.next_deadline()) == (S.SEEKING, [], 0.5)
    assert request.poll(0.4) == []
    assert request.poll(0.5) == [m.ChooseDecode(frozenset(), P1, 1)], "who refused a while ago may accept now"
    _, effects = walk(m.DecodeUnavailable(0.5), m.SeekDue(), start=request)
    assert effects == [m.ChooseDecode(frozenset(), P1, 2)]
    assert request.num_asked == 2


def test_a_decode_worker_that_is_lost_while_asked_is_told_and_not_asked_again() -> None:
    request, effects = walk(*TO[S.BINDING], m.DecodeLost(LOST))
    assert effects == [m.AbortWork(D1, "gone"), m.ChooseDecode(frozenset({D1}), P1, 1)]
    _, effects = walk(m.DecodeUnavailable(0.5), m.SeekDue(), start=request)
    assert effects == [m.ChooseDecode(frozenset({D1}), P1, 1)], (
        "its late answer must not be taken for one to a new question"
    )


def test_the_first_token_may_come_before_any_decode_worker_is_bound() -> None:
    request, effects = walk(*TO[S.SEEKING], m.DecodeUnavailable(50.0), m.PrefillProduced(tokens(0)))
    assert (request.state, effects) == (S.HOLDING, [m.Deliver(tokens(0))])
    request, effects = walk(m.PrefillMeasured(0.1, 0.2, 4), m.SeekDue(), m.DecodeChosen(D1), start=request)
    assert (request.state, effects) == (S.PLACING, [m.SubmitDecode(D1, None, 0, True)])
    request, effects = walk(m.DecodeRejected(rejected()), start=request)
    assert (request.state, effects[-1]) == (S.HOLDING, m.ChooseDecode(frozenset({D1}), P1, 2))
    request, effects = walk(m.DecodeChosen(D2), m.DecodeAccepted(0), start=request)
    assert (request.state, effects) == (S.HANDING_OVER, [m.BindPrefill(P1, D2)])
    _, effects = walk(LANDED, m.DecodeProduced(tokens(1)), start=request)
    assert effects == [m.Deliver(tokens(1))]


def test_an_answer_that_is_due_stays_due_when_the_first_token_comes() -> None:
    request, _ = walk(*TO[S.BINDING])
    due = request.next_deadline()
    request.handle(m.PrefillProduced(tokens(0)), due - 0.5 if due else 0.0)
    assert (request.state, request.next_deadline()) == (S.PLACING, due)
    assert due is not None
    assert freed(request.poll(due)) == [D1]
    assert request.state is S.HOLDING


def test_when_nobody_is_found_in_good_time_the_prefill_worker_goes_on_alone() -> None:
    request, _ = walk(*TO[S.HOLDING], m.DecodeUnavailable(1000.0))
    held_since = len(TO[S.HOLDING]) - 1
    assert request.poll(held_since + 19.9) == []
    assert request.poll(held_since + 20.0) == [m.BindPrefill(P1, None)]
    assert (request.state, request.is_kept) == (S.GENERATING, True)
    _, effects = walk(m.PrefillProduced(tokens(1)), m.PrefillFinished(tokens(2), END), start=request)
    assert effects == [m.Deliver(tokens(2)), m.ReleaseWorker(P1), m.Conclude(finish=END)]


def test_holding_too_long_waits_for_the_answer_that_is_due() -> None:
    request, _ = walk(*TO[S.HOLDING], m.DecodeUnavailable(24.5))
    request.handle(m.SeekDue(), 24.0)
    request.handle(m.DecodeChosen(D1), 24.0)
    assert request.next_deadline() == 26.0, "not the end of the holding, which would be polled for ever"
    request.handle(m.DecodeRejected(rejected()), 25.0)
    request.handle(m.DecodeUnavailable(1.0), 25.0)
    assert request.poll(25.0) == [m.BindPrefill(P1, None)]


@pytest.mark.parametrize("state", [S.SEEKING, S.BINDING])
def test_a_first_token_that_is_the_last_needs_no_decode_worker(state: RequestState) -> None:
    _, effects = walk(*TO[state], m.PrefillFinished(tokens(0), END))
    assert freed(effects) == ([D1] if state is S.BINDING else [])
    assert effects[-2:] == [m.ReleaseWorker(P1), m.Conclude(finish=END)]


@pytest.mark.parametrize("state", [S.STARTING, S.SEEKING, S.BINDING])
def test_a_prefill_worker_lost_before_the_first_token_begins_anew(state: RequestState) -> None:
    request, effects = walk(*TO[state], m.PrefillLost(LOST))
    assert effects[-1] == m.ChooseWorkers(frozenset({P1}))
    assert freed(effects) == ([P1, D1] if state is S.BINDING else [P1])
    _, effects = walk(m.PairChosen(P2, D1), start=request)
    assert effects == [m.SubmitDecode(D1, P2, 1, True)]
    assert not request.is_late


@pytest.mark.parametrize("state", [S.HOLDING, S.PLACING])
def test_a_prefill_worker_lost_with_the_kv_ends_the_request(state: RequestState) -> None:
    request, effects = walk(*TO[state], m.PrefillLost(LOST))
    assert request.state is S.FAILED
    assert effects[-1] == m.Conclude(error=LOST)


@pytest.mark.parametrize("role", list(Role))
def test_one_worker_does_it_alone(role: Role) -> None:
    is_decode = role is Role.DECODE
    worker = D1 if is_decode else P1
    request, effects = walk(*ROUTED, m.DecodeAloneChosen(D1) if is_decode else m.PrefillAloneChosen(P1))
    assert (request.state, effects) == (S.ENGAGING, [m.SubmitAlone(worker, role, 0, True)])
    request, effects = walk(m.DecodeAccepted(0) if is_decode else m.PrefillAccepted(0), start=request)
    assert (request.state, effects) == (S.COMPUTING, [m.LeaveQueue()])
    first, last = (
        (m.DecodeProduced(tokens(0)), m.DecodeFinished(tokens(1), END))
        if is_decode
        else (m.PrefillProduced(tokens(0)), m.PrefillFinished(tokens(1), END))
    )
    request, effects = walk(first, m.PrefillMeasured(0.1, 0.2, 7), last, start=request)
    assert effects == [m.Deliver(tokens(1)), m.ReleaseWorker(worker), m.Conclude(finish=END)]
    assert request.cached_tokens == 7
    served = (request.prefill_worker, request.decode_worker)
    assert served == ((None, D1) if is_decode else (P1, None))


@pytest.mark.parametrize(
    ("state", "worker", "lost"),
    [(S.ENGAGING, D1, m.DecodeLost(LOST)), (S.COMPUTING, D1, m.DecodeLost(LOST))],
)
def test_a_lone_worker_lost_before_the_first_token_is_replaced(
    state: RequestState, worker: WorkerId, lost: m.Event
) -> None:
    _, effects = walk(*TO[state], lost)
    assert freed(effects) == [worker]
    assert effects[-1] == m.ChooseWorkers(frozenset({worker}))


def test_a_lone_worker_lost_after_the_first_token_ends_the_request() -> None:
    request, effects = walk(*TO[S.GENERATING], m.DecodeLost(LOST))
    assert (request.state, effects[-1]) == (S.FAILED, m.Conclude(error=LOST))


def test_busier_than_thought_costs_a_choice_and_excludes_nobody() -> None:
    request, effects = walk(*TO[S.RESERVING], m.DecodeRejected(BUSIER))
    assert effects[-1] == m.ChooseWorkers(frozenset())
    request, effects = walk(m.PairChosen(P1, D1), m.DecodeAccepted(0), m.PrefillRejected(BUSIER), start=request)
    assert effects[-1] == m.ChoosePrefill(frozenset(), D1)
    request, effects = walk(m.PrefillChosen(P1), start=request)
    assert effects == [m.SubmitPrefill(P1, D1, 1, True)], "the decode worker's answers do not count against this role"
    request, effects = walk(m.PrefillRejected(BUSIER), m.PrefillChosen(P2), start=request)
    assert effects == [m.SubmitPrefill(P2, D1, 1, False)], "the third question takes no such answer"
    _, effects = walk(m.PrefillRejected(BUSIER), start=request)
    assert effects[-1] == m.ChoosePrefill(frozenset({P2}), D1)


def test_another_round_asks_conditionally_again() -> None:
    request, _ = walk(*TO[S.RESERVING], m.DecodeRejected(BUSIER), m.PairChosen(P1, D1), m.DecodeRejected(BUSIER))
    _, effects = walk(m.PairChosen(P1, D1), start=request)
    assert effects == [m.SubmitDecode(D1, P1, 2, False)]
    _, effects = walk(
        m.DecodeRejected(rejected()), m.NothingFits("x"), m.Released(), m.PairChosen(P1, D1), start=request
    )
    assert effects == [m.SubmitDecode(D1, P1, 3, True)]


def test_busier_is_no_reason_to_call_a_request_too_long() -> None:
    request, _ = walk(*TO[S.RESERVING], m.DecodeRejected(BUSIER))
    assert not request.is_too_long
    walk(m.PairChosen(P1, D1), m.DecodeRejected(rejected(RejectReason.TOO_LONG)), start=request)
    assert request.is_too_long


def test_only_a_state_that_waits_for_a_decode_worker_is_polled_for_one() -> None:
    request, _ = walk(*TO[S.SEEKING], m.DecodeUnavailable(3.0), m.PrefillProduced(tokens(0)))
    assert request.next_deadline() == len(TO[S.SEEKING]) + 3.0, "the first token does not put it off"
    request = at(S.BINDING)
    assert request.next_deadline() == len(TO[S.BINDING]) - 1 + 2.0
