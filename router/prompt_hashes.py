"""The block hashes of one prompt, per block size and weights version, each computed once.

Workers may differ in block size (frames are keyed by token ranges), and every worker must be given the hashes that
its own cache is keyed by. A cluster in the middle of a rollout serves two weights versions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from core.blocks import block_hashes, hash_namespace


class HashKey(NamedTuple):
    """What the chain of a worker's cache depends on. With no weights version told, the worker computes its own."""

    weights_version: str
    block_size: int

    @property
    def is_known(self) -> bool:
        return bool(self.weights_version) and self.block_size > 0


class PromptHashes:
    """Lazy hashes of one prompt."""

    def __init__(self, token_ids: Sequence[int], *, adapter: str = "", salt: str = "") -> None:
        self._token_ids = token_ids
        self._adapter = adapter
        self._salt = salt
        self._computed: dict[HashKey, tuple[bytes, ...]] = {}

    @classmethod
    def known(cls, hashes: Mapping[HashKey, tuple[bytes, ...]]) -> "PromptHashes":
        """Hashes that were computed elsewhere; every other key has none."""
        made = cls(())
        made._computed.update(hashes)
        return made

    def of(self, key: HashKey) -> tuple[bytes, ...]:
        """Return the hash of every full block under `key`; none for an unknown key."""
        if not key.is_known:
            return ()
        hashes = self._computed.get(key)
        if hashes is None:
            root = hash_namespace(key.weights_version, adapter=self._adapter, tenant_salt=self._salt)
            hashes = self._computed[key] = block_hashes(self._token_ids, key.block_size, root)
        return hashes
