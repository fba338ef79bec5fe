"""Hot prefixes against exact counting."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from router.index.hot import GRID, HALF_LIFE_S, HOT_RATIO, HotPrefixes


def prompt(*names: str) -> tuple[bytes, ...]:
    """One block per name, hashes chained by hand."""
    return tuple("/".join(names[: depth + 1]).encode() for depth in range(len(names)))


def on_grid(depth: int) -> int:
    """The deepest depth that the sketch can say, of those not below `depth`."""
    return max((position + 1 for position in GRID if position < depth), default=0)


def test_the_grid_is_every_early_block_and_then_eight_per_doubling() -> None:
    assert GRID[:18] == (*range(16), 17, 19)
    assert all(later - earlier <= max(1, earlier // 8 + 1) for earlier, later in pairwise(GRID))
    assert len([position for position in GRID if position < 1875]) < 80


def test_a_shared_system_prompt_is_hot_and_what_follows_is_not() -> None:
    hot = HotPrefixes(2**20)
    system = [f"s{number}" for number in range(100)]
    for number in range(200):
        hot.observe(prompt(*system, *[f"u{number}-{block}" for block in range(50)]), number * 0.1)
    blocks, reuses = hot.measure(prompt(*system, "x", "y"))
    assert blocks == on_grid(100) == 96
    assert 150 < reuses <= 200
    assert hot.measure(prompt("elsewhere")) == (0, 0.0)
    assert hot.measure(()) == (0, 0.0)


def test_nothing_is_hot_before_enough_prompts_have_come_nor_long_after() -> None:
    hot = HotPrefixes(2**20)
    for number in range(7):
        hot.observe(prompt("s", "t"), number * 0.001)
    assert hot.measure(prompt("s", "t")) == (0, 0.0)
    for _ in range(10):
        hot.observe(prompt("s", "t"), 0.01)
    assert hot.measure(prompt("s", "t"))[0] == 2
    for number in range(200):
        hot.observe(prompt(f"other{number}"), 0.01 + 4 * HALF_LIFE_S)
    assert hot.measure(prompt("s", "t")) == (0, 0.0)


def test_reuses_halve_with_age() -> None:
    hot = HotPrefixes(2**20)
    for _ in range(64):
        hot.observe(prompt("s"), 0.0)
    hot.observe(prompt("x"), HALF_LIFE_S)
    assert hot.measure(prompt("s")) == pytest.approx((1, 32.0))
    hot.observe(prompt("x"), HALF_LIFE_S / 2)  # a clock that stepped back
    assert hot.measure(prompt("s")) == pytest.approx((1, 32.0))


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_exact_counting_finds_in_bounded_memory(seed: int) -> None:
    rng = random.Random(seed)
    hot = HotPrefixes(256 * 400)
    exact: Counter[bytes] = Counter()
    trees = [[f"t{tree}-{depth}" for depth in range(rng.randrange(2, 60))] for tree in range(12)]
    weights = [2.0**-tree for tree in range(12)]
    total = 6000
    for number in range(total):
        tree = rng.choices(trees, weights)[0]
        shared = tree[: rng.randrange(len(tree) // 2, len(tree) + 1)]
        hashes = prompt(*shared, *[f"u{number}-{block}" for block in range(rng.randrange(40))])
        hot.observe(hashes, 0.0)
        exact.update(hashes)
    assert hot.num_bytes <= 256 * 400
    for tree in trees:
        hashes = prompt(*tree)
        surely = sum(exact[block] >= 1.15 * HOT_RATIO * total for block in hashes)
        perhaps = sum(exact[block] >= HOT_RATIO * total for block in hashes)
        blocks, reuses = hot.measure(hashes)
        assert on_grid(surely) <= blocks <= perhaps
        if blocks:
            assert 0.9 * exact[hashes[blocks - 1]] <= reuses <= exact[hashes[blocks - 1]], "never more than came"


def test_weights_stay_finite_over_a_very_long_time() -> None:
    hot = HotPrefixes(2**20)
    for number in range(3000):
        hot.observe(prompt("s", str(number)), number * HALF_LIFE_S / 4)
    blocks, reuses = hot.measure(prompt("s"))
    assert blocks == 0, "fewer than eight recent ones"
    assert reuses == 0.0
    for _ in range(20):
        hot.observe(prompt("s"), 3000 * HALF_LIFE_S / 4)
    assert hot.measure(prompt("s")) == pytest.approx((1, 20 + 1 / (1 - 2**-0.25) - 1), rel=0.01)
