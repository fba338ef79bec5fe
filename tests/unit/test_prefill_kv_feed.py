"""What is ready before a transfer is offered is passed on after it: all of it, once, in order, in few parts."""

from hypothesis import given
from hypothesis import strategies as st

from core.ids import RequestId, TransferId
from prefill_workers.kv_feed import KvFeed

T = TransferId("r/0")
R = RequestId("r")


class Sent:
    """Takes the place of the sender."""

    def __init__(self) -> None:
        self.said: list[tuple[range, range] | int] = []

    def push(self, transfer_id: TransferId, layers: range, tokens: range) -> None:
        assert transfer_id == T
        self.said.append((layers, tokens))

    def commit(self, transfer_id: TransferId, first_token_id: int) -> None:
        self.said.append(first_token_id)


def test_before_the_offer_nothing_is_said_and_after_it_everything_at_once() -> None:
    sent = Sent()
    feed = KvFeed(sent, T)
    feed.on_kv_ready(R, range(2), range(8))
    feed.on_kv_ready(R, range(2, 3), range(8))
    assert sent.said == []
    feed.open()
    assert sent.said == [(range(3), range(8))]
    feed.on_kv_ready(R, range(2), range(8, 11))
    feed.commit(42)
    assert sent.said == [(range(3), range(8)), (range(2), range(8, 11)), 42]


def test_a_commit_before_the_offer_follows_all_parts() -> None:
    sent = Sent()
    feed = KvFeed(sent, T)
    feed.on_kv_ready(R, range(3), range(8))
    feed.commit(42)
    feed.open()
    assert sent.said == [(range(3), range(8)), 42]


@given(
    cached=st.integers(0, 9),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    group=st.integers(1, 5),
    opened_after=st.integers(0, 40),
)
def test_whenever_it_is_opened_every_layer_of_every_position_is_pushed_once(
    cached: int, chunks: list[int], group: int, opened_after: int
) -> None:
    num_layers = 7
    sent = Sent()
    feed = KvFeed(sent, T)
    ready = [(range(num_layers), range(cached))] if cached else []
    start = cached
    for chunk in chunks:
        tokens = range(start, start + chunk)
        ready += [(range(at, min(at + group, num_layers)), tokens) for at in range(0, num_layers, group)]
        start += chunk
    for at, (layers, tokens) in enumerate(ready):
        if at == opened_after:
            feed.open()
            assert len(sent.said) <= 2 + num_layers // group
        feed.on_kv_ready(R, layers, tokens)
    feed.commit(42)
    if opened_after >= len(ready):
        feed.open()
        assert len(sent.said) == 2  # all of it, and the commit
    assert sent.said[-1] == 42
    parts = [part for part in sent.said if not isinstance(part, int)]
    assert len(parts) == len(sent.said) - 1
    places = [(layer, token) for layers, tokens in parts for layer in layers for token in tokens]
    assert sorted(places) == [(layer, token) for layer in range(num_layers) for token in range(start)]
