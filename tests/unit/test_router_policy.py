"""The routing policy: a table of cases, and properties that hold for any cluster."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import Epoch, WorkerId
from core.membership import LoadReport, Role, WorkerState
from router.config import RoutingConfig
from router.cost import blocks_free, decode_s, prefill_s, queue_s, transfer_s
from router.policy import Decision, NoCandidate, Obstacle, PickReason, choose, softmax
from router.snapshot import ClusterSnapshot, Credit, RouteQuery, WorkerView

CONFIG = RoutingConfig()
QUERY = RouteQuery(num_prompt_tokens=1000, max_total_tokens=1100, needs_decode=True, held_tokens={})


def worker(name: str, **changes: object) -> WorkerView:
    """p... is a prefill worker, d... a decode worker."""
    view = WorkerView(
        worker_id=WorkerId(name),
        role=Role.PREFILL if name.startswith("p") else Role.DECODE,
        epoch=Epoch(1),
        state=WorkerState.READY,
        connected_epoch=Epoch(1),
        layout_fingerprint="layout",
        block_size=16,
        max_model_len=4096,
        kv_bytes_per_token=1000,
        prefill_tokens_per_s=1000.0,
        load=LoadReport(free_blocks=1000, total_blocks=1000),
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def cluster(*workers: WorkerView, links: dict[tuple[str, str], float] | None = None) -> ClusterSnapshot:
    known = {(WorkerId(p), WorkerId(d)): cost for (p, d), cost in (links or {}).items()}
    return ClusterSnapshot(workers, 0.25, known, default_link_s_per_byte=1e-9)


def place(
    snapshot: ClusterSnapshot, query: RouteQuery = QUERY, config: RoutingConfig = CONFIG, seed: int = 0
) -> Decision:
    decision = choose(snapshot, query, config, random.Random(seed))
    assert isinstance(decision, Decision), decision
    return decision


def refuse(snapshot: ClusterSnapshot, query: RouteQuery = QUERY) -> tuple[Role, Obstacle]:
    outcome = choose(snapshot, query, CONFIG, random.Random(0))
    assert isinstance(outcome, NoCandidate), outcome
    return outcome.role, outcome.obstacle


def loaded(**fields: float) -> LoadReport:
    return LoadReport.model_validate({"free_blocks": 1000, "total_blocks": 1000, **fields})


HELD = {WorkerId("p2"): 640}
CASES: list[tuple[str, ClusterSnapshot, RouteQuery, str, str, PickReason]] = [
    ("only-pair", cluster(worker("p1"), worker("d1")), QUERY, "p1", "d1", PickReason.ONLY),
    (
        "shorter-queue",
        cluster(worker("p1", load=loaded(queued_prefill_tokens=500)), worker("p2"), worker("d1")),
        QUERY,
        "p2",
        "d1",
        PickReason.CHEAPEST,
    ),
    (
        "credit-counts-as-queue",
        cluster(worker("p1", credit=Credit(1, 500, 500)), worker("p2"), worker("d1")),
        QUERY,
        "p2",
        "d1",
        PickReason.CHEAPEST,
    ),
    (
        "faster-machine",
        cluster(worker("p1"), worker("p2", prefill_tokens_per_s=2000.0), worker("d1")),
        QUERY,
        "p2",
        "d1",
        PickReason.CHEAPEST,
    ),
    (
        "held-prefix",
        cluster(worker("p1"), worker("p2"), worker("d1")),
        replace(QUERY, held_tokens=HELD),
        "p2",
        "d1",
        PickReason.PREFIX,
    ),
    (
        "held-prefix-behind-a-longer-queue",
        cluster(worker("p1"), worker("p2", load=loaded(queued_prefill_tokens=700)), worker("d1")),
        replace(QUERY, held_tokens=HELD),
        "p1",
        "d1",
        PickReason.CHEAPEST,
    ),
    (
        "smaller-batch",
        cluster(worker("p1"), worker("d1", load=loaded(num_running=9)), worker("d2")),
        QUERY,
        "p1",
        "d2",
        PickReason.CHEAPEST,
    ),
    (
        "shorter-contexts",
        cluster(worker("p1"), worker("d1", load=loaded(context_tokens=90_000)), worker("d2")),
        QUERY,
        "p1",
        "d2",
        PickReason.CHEAPEST,
    ),
    (
        "room-for-the-blocks",
        cluster(worker("p1"), worker("d1", load=LoadReport(free_blocks=9, total_blocks=99)), worker("d2")),
        QUERY,
        "p1",
        "d2",
        PickReason.CHEAPEST,
    ),
    (
        "slower-machine-for-decode",
        cluster(worker("p1"), worker("d1", decode_scale=3.0), worker("d2")),
        QUERY,
        "p1",
        "d2",
        PickReason.CHEAPEST,
    ),
    (
        "better-link",
        cluster(worker("p1"), worker("d1"), worker("d2"), links={("p1", "d1"): 1e-7}),
        QUERY,
        "p1",
        "d2",
        PickReason.CHEAPEST,
    ),
    (
        "less-to-transfer",
        cluster(worker("p1"), worker("d1"), worker("d2")),
        replace(QUERY, held_tokens={WorkerId("d2"): 640}),
        "p1",
        "d2",
        PickReason.CHEAPEST,
    ),
    (
        "same-layout",
        cluster(worker("p1", layout_fingerprint="other"), worker("p2"), worker("d1")),
        QUERY,
        "p2",
        "d1",
        PickReason.ONLY,
    ),
    (
        "reserved-decode",
        cluster(worker("p1"), worker("d1", load=loaded(num_running=99)), worker("d2")),
        replace(QUERY, reserved_decode=WorkerId("d1")),
        "p1",
        "d1",
        PickReason.ONLY,
    ),
    (
        "not-refused-yet",
        cluster(worker("p1"), worker("p2"), worker("d1")),
        replace(QUERY, refused=frozenset({WorkerId("p1")})),
        "p2",
        "d1",
        PickReason.ONLY,
    ),
]


@pytest.mark.parametrize(
    ("snapshot", "query", "prefill", "decode", "reason"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_picks(snapshot: ClusterSnapshot, query: RouteQuery, prefill: str, decode: str, reason: PickReason) -> None:
    decision = place(snapshot, query)
    assert (decision.winner.prefill, decision.winner.decode, decision.reason) == (prefill, decode, reason)
    assert decision.staleness_s == 0.25


OBSTACLES: list[tuple[str, ClusterSnapshot, RouteQuery, Role, Obstacle]] = [
    ("no-workers", cluster(), QUERY, Role.PREFILL, Obstacle.ABSENT),
    ("no-decode", cluster(worker("p1")), QUERY, Role.DECODE, Obstacle.ABSENT),
    (
        "draining",
        cluster(worker("p1", state=WorkerState.DRAINING), worker("d1")),
        QUERY,
        Role.PREFILL,
        Obstacle.NOT_LIVE,
    ),
    ("unconnected", cluster(worker("p1"), worker("d1", connected_epoch=None)), QUERY, Role.DECODE, Obstacle.NOT_LIVE),
    ("old-stream", cluster(worker("p1"), worker("d1", epoch=Epoch(2))), QUERY, Role.DECODE, Obstacle.NOT_LIVE),
    ("too-long", cluster(worker("p1"), worker("d1", max_model_len=1099)), QUERY, Role.DECODE, Obstacle.TOO_LONG),
    (
        "refused",
        cluster(worker("p1"), worker("d1"), worker("d2", state=WorkerState.LOADING)),
        replace(QUERY, refused=frozenset({WorkerId("d1")})),
        Role.DECODE,
        Obstacle.REFUSED,
    ),
    ("layouts", cluster(worker("p1", layout_fingerprint="other"), worker("d1")), QUERY, Role.DECODE, Obstacle.LAYOUT),
]


@pytest.mark.parametrize(
    ("snapshot", "query", "role", "obstacle"), [c[1:] for c in OBSTACLES], ids=[c[0] for c in OBSTACLES]
)
def test_says_what_is_missing(snapshot: ClusterSnapshot, query: RouteQuery, role: Role, obstacle: Obstacle) -> None:
    assert refuse(snapshot, query) == (role, obstacle)


def test_a_request_of_one_token_is_placed_on_a_prefill_worker_alone() -> None:
    decision = place(cluster(worker("p1")), replace(QUERY, needs_decode=False))
    assert (decision.winner.decode, decision.winner.terms.decode_s, decision.winner.terms.transfer_s) == (
        None,
        0.0,
        0.0,
    )


def test_a_decode_worker_that_accepted_stays_good_while_it_drains() -> None:
    draining = worker("d1", state=WorkerState.DRAINING)
    decision = place(cluster(worker("p1"), draining), replace(QUERY, reserved_decode=WorkerId("d1")))
    assert decision.winner.decode == "d1"


def test_ties_are_drawn_and_not_decided_by_name() -> None:
    snapshot = cluster(*(worker(f"p{index}") for index in range(4)), worker("d1"))
    winners = {place(snapshot, seed=seed).winner.prefill for seed in range(64)}
    assert len(winners) == 4
    assert place(snapshot).reason is PickReason.TIE


def test_ties_are_fair_beyond_the_few_that_are_scored() -> None:
    config = RoutingConfig(candidates_per_role=2)
    snapshot = cluster(*(worker(f"p{index}") for index in range(6)), worker("d1"))
    winners = {place(snapshot, config=config, seed=seed).winner.prefill for seed in range(200)}
    assert len(winners) == 6


def test_temperature_spreads_and_says_so() -> None:
    snapshot = cluster(worker("p1", load=loaded(queued_prefill_tokens=100)), worker("p2"), worker("d1"))
    hot = RoutingConfig(temperature=5.0)
    reasons = {place(snapshot, config=hot, seed=seed).reason for seed in range(64)}
    assert reasons == {PickReason.CHEAPEST, PickReason.SAMPLED}
    cold = RoutingConfig(temperature=0.01)
    assert {place(snapshot, config=cold, seed=seed).winner.prefill for seed in range(64)} == {"p2"}


def test_softmax_has_no_unit() -> None:
    assert softmax([1.0, 2.0, 3.0], 1.0) == pytest.approx(softmax([1e-3, 2e-3, 3e-3], 1.0))
    assert softmax([2.0, 2.0], 0.5) == [1.0, 1.0]


loads = st.builds(
    LoadReport,
    num_running=st.integers(0, 64),
    num_waiting=st.integers(0, 64),
    queued_prefill_tokens=st.integers(0, 100_000),
    context_tokens=st.integers(0, 500_000),
    free_blocks=st.integers(0, 2000),
    total_blocks=st.just(2000),
)
credits_ = st.builds(Credit, st.integers(0, 20), st.integers(0, 20_000), st.integers(0, 20_000))


@st.composite
def clusters(draw: st.DrawFn) -> ClusterSnapshot:
    workers = []
    for role, count in (("p", draw(st.integers(0, 12))), ("d", draw(st.integers(0, 12)))):
        for index in range(count):
            workers.append(
                worker(
                    f"{role}{index}",
                    load=draw(loads),
                    credit=draw(credits_),
                    state=draw(st.sampled_from(list(WorkerState))),
                    connected_epoch=draw(st.sampled_from([None, Epoch(1), Epoch(2)])),
                    epoch=draw(st.sampled_from([Epoch(1), Epoch(2)])),
                    layout_fingerprint=draw(st.sampled_from(["a", "b"])),
                    max_model_len=draw(st.sampled_from([0, 1000, 5000])),
                    prefill_tokens_per_s=draw(st.floats(1.0, 1e6)),
                    decode_scale=draw(st.floats(0.01, 100.0)),
                )
            )
    return cluster(*workers)


names = st.sampled_from([WorkerId(f"{role}{index}") for role in "pd" for index in range(12)])
queries = st.builds(
    RouteQuery,
    num_prompt_tokens=st.integers(1, 3000),
    max_total_tokens=st.integers(3001, 4000),
    needs_decode=st.booleans(),
    held_tokens=st.dictionaries(names, st.integers(0, 3000), max_size=6),
    refused=st.frozensets(names, max_size=6),
)


@given(clusters(), queries, st.floats(0, 5), st.integers(0, 2**32))
def test_never_picks_who_must_not_be_asked(
    snapshot: ClusterSnapshot, query: RouteQuery, heat: float, seed: int
) -> None:
    outcome = choose(snapshot, query, RoutingConfig(temperature=heat), random.Random(seed))
    by_id = {view.worker_id: view for view in snapshot.workers}
    usable = {
        view.worker_id
        for view in snapshot.workers
        if view.state is WorkerState.READY
        and view.connected_epoch == view.epoch
        and view.worker_id not in query.refused
        and (view.max_model_len == 0 or view.max_model_len >= query.max_total_tokens)
    }
    if isinstance(outcome, NoCandidate):
        prefills = {name for name in usable if by_id[name].role is Role.PREFILL}
        decodes = {name for name in usable if by_id[name].role is Role.DECODE}
        layouts = [{by_id[name].layout_fingerprint for name in names} for names in (prefills, decodes)]
        assert not prefills or (query.needs_decode and not (layouts[0] & layouts[1]))
        return
    winner = outcome.winner
    assert winner in outcome.candidates
    assert {winner.prefill} <= usable
    assert by_id[winner.prefill].role is Role.PREFILL
    if query.needs_decode:
        assert winner.decode in usable
        assert by_id[winner.decode].role is Role.DECODE
        assert by_id[winner.decode].layout_fingerprint == by_id[winner.prefill].layout_fingerprint
    else:
        assert winner.decode is None
    costs = [one.terms.total_s for one in outcome.candidates]
    assert costs == sorted(costs)
    assert all(min(one.terms.queue_s, one.terms.transfer_s, one.terms.decode_s) >= 0 for one in outcome.candidates)
    assert all(one.terms.prefill_s > 0 for one in outcome.candidates)


@given(clusters(), queries, st.randoms(use_true_random=False), st.integers(0, 2**32))
def test_the_order_of_the_workers_does_not_matter(
    snapshot: ClusterSnapshot, query: RouteQuery, order: random.Random, seed: int
) -> None:
    shuffled = list(snapshot.workers)
    order.shuffle(shuffled)
    one = choose(snapshot, query, CONFIG, random.Random(seed))
    other = choose(replace(snapshot, workers=tuple(shuffled)), query, CONFIG, random.Random(seed))
    assert one == other


@given(clusters(), queries, st.integers(0, 2**32))
def test_the_exact_minimum_wins_when_all_are_scored(snapshot: ClusterSnapshot, query: RouteQuery, seed: int) -> None:
    config = RoutingConfig(candidates_per_role=100)
    outcome = choose(snapshot, query, config, random.Random(seed))
    if isinstance(outcome, Decision):
        lowest = min(one.terms.total_s for one in outcome.candidates)
        assert outcome.winner.terms.total_s <= lowest + 1e-9


@given(
    loads,
    credits_,
    st.sampled_from(["num_running", "num_waiting", "queued_prefill_tokens", "context_tokens"]),
    st.integers(1, 10_000),
)
def test_cost_never_falls_when_load_grows(load: LoadReport, credit: Credit, term: str, more: int) -> None:
    before = worker("d1", load=load, credit=credit)
    after = replace(before, load=load.model_copy(update={term: getattr(load, term) + more}))
    assert queue_s(after) >= queue_s(before)
    assert decode_s(CONFIG, after, QUERY) >= decode_s(CONFIG, before, QUERY)
    assert queue_s(after) + decode_s(CONFIG, after, QUERY) > queue_s(before) + decode_s(CONFIG, before, QUERY)
    fuller = replace(before, load=load.model_copy(update={"free_blocks": max(0, load.free_blocks - more)}))
    assert blocks_free(fuller) <= blocks_free(before)
    assert decode_s(CONFIG, fuller, QUERY) >= decode_s(CONFIG, before, QUERY)


@given(credits_, st.integers(0, 10), st.integers(0, 10_000), st.integers(0, 10_000))
def test_cost_never_falls_when_credit_grows(credit: Credit, requests: int, tokens: int, context: int) -> None:
    before = worker("d1", credit=credit)
    grown = Credit(credit.num_requests + requests, credit.prefill_tokens + tokens, credit.context_tokens + context)
    after = replace(before, credit=grown)
    assert queue_s(after) >= queue_s(before)
    assert decode_s(CONFIG, after, QUERY) >= decode_s(CONFIG, before, QUERY)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 5000))
def test_a_longer_held_prefix_never_costs_more(prompt: int, held: int, more: int) -> None:
    less = replace(QUERY, num_prompt_tokens=prompt, held_tokens={WorkerId("p1"): held, WorkerId("d1"): held})
    longer = replace(less, held_tokens={WorkerId("p1"): held + more, WorkerId("d1"): held + more})
    prefill, decode = worker("p1"), worker("d1")
    snapshot = cluster(prefill, decode)
    assert prefill_s(prefill, longer) <= prefill_s(prefill, less)
    assert transfer_s(snapshot, WorkerId("p1"), decode, longer) <= transfer_s(snapshot, WorkerId("p1"), decode, less)
    assert decode_s(CONFIG, decode, longer) <= decode_s(CONFIG, decode, less)
