"""Chained block hashes: equal prefix if and only if equal hash, within one namespace."""

from hypothesis import given
from hypothesis import strategies as st

from core.blocks import HASH_BYTES, block_hashes, extend_hash, hash_namespace, num_blocks

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
ROOT = hash_namespace("weights")


@given(TOKENS, st.integers(1, 9))
def test_one_hash_per_full_block(tokens: list[int], block_size: int) -> None:
    hashes = block_hashes(tokens, block_size, ROOT)
    assert len(hashes) == len(tokens) // block_size
    assert all(len(digest) == HASH_BYTES for digest in hashes)


@given(TOKENS, st.integers(1, 9))
def test_whole_and_block_by_block_agree(tokens: list[int], block_size: int) -> None:
    parent = ROOT
    chain = []
    for start in range(0, len(tokens) // block_size * block_size, block_size):
        parent = extend_hash(parent, tokens[start : start + block_size])
        chain.append(parent)
    assert block_hashes(tokens, block_size, ROOT) == tuple(chain)


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_hashes_agree_exactly_as_far_as_the_prefixes(left: list[int], right: list[int], block_size: int) -> None:
    pairs = zip(block_hashes(left, block_size, ROOT), block_hashes(right, block_size, ROOT), strict=False)
    for index, (one, other) in enumerate(pairs):
        end = (index + 1) * block_size
        assert (one == other) == (left[:end] == right[:end])


def test_namespaces_separate_weights_adapters_and_tenants() -> None:
    roots = {
        hash_namespace("w"),
        hash_namespace("w2"),
        hash_namespace("w", adapter="a"),
        hash_namespace("w", tenant_salt="a"),
        hash_namespace("wa"),
    }
    assert len(roots) == 5


def test_num_blocks_rounds_up() -> None:
    assert [num_blocks(tokens, 16) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
