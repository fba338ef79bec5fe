"""Chained hashes of KV blocks: the key of every prefix cache and of the router's prefix index.

The hash of block i covers everything before it (parent hash, then the block's token ids), so equal hashes mean equal
prefixes. The chain starts from a namespace, which separates what must never be shared: weights, adapters, tenants.
BLAKE2b with 16-byte digests rather than a faster non-cryptographic hash: prompts are written by strangers, and a
collision that somebody can construct would hand one tenant's KV to another. Source: the chained block hash of vLLM's
prefix cache and of Mooncake's conductor.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def hash_namespace(weights_version: str, *, adapter: str = "", tenant_salt: str = "") -> bytes:
    """Return the root of a chain. Pure; fields are length-prefixed, so no two tuples collide by concatenation."""
    digest = blake2b(digest_size=HASH_BYTES)
    for part in (weights_version, adapter, tenant_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.digest()


def extend_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash of one full block of `token_ids` that follows `parent`. Pure."""
    return blake2b(array("I", token_ids).tobytes(), digest_size=HASH_BYTES, key=parent).digest()


def block_hashes(token_ids: Sequence[int], block_size: int, namespace: bytes) -> tuple[bytes, ...]:
    """Return the chained hash of every FULL block of `token_ids`; a ragged tail has none. Pure."""
    packed = array("I", token_ids).tobytes()
    stride = block_size * array("I").itemsize
    hashes = []
    parent = namespace
    for start in range(0, len(packed) - stride + 1, stride):
        parent = blake2b(packed[start : start + stride], digest_size=HASH_BYTES, key=parent).digest()
        hashes.append(parent)
    return tuple(hashes)


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold `num_tokens`."""
    return -(-num_tokens // block_size)
