"""API keys: how one is made, what is kept of it, and the ring in which a presented one is looked up.

Only a hash is kept. A key is 256 random bits, so nothing is gained by a slow hash: guessing it is hopeless at any
speed (docs/adr/0018). The first digits of the hash are the key's fingerprint: its name in logs, in `tandem keys` and
in the ring, whose lookup may take what time it likes, since it compares nothing that a caller could learn.
"""

import hashlib
import hmac
import secrets
import string
from collections.abc import Iterable
from datetime import datetime, timedelta

from pydantic import ValidationError

from core.errors import AccessReason, InvalidRequest, Unauthenticated
from router.access.config import FINGERPRINT_CHARACTERS, ApiKeyConfig
from router.access.principal import Role

PREFIX = "tnd-"
_ALPHABET = string.ascii_letters + string.digits
_RANDOM_CHARACTERS = 43  # 256 bits
_MAX_LIFETIME_S = 10 * 365 * 86_400


def new_key() -> str:
    """Return a fresh key, drawn from the system's generator."""
    return PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))


def hash_of(key: str) -> str:
    """Return what is kept of a key. Pure."""
    return hashlib.sha256(key.encode()).hexdigest()


def checked_key(
    name: str, tenant: str, roles: frozenset[Role], key: str, now: datetime, lifetime_s: float | None
) -> ApiKeyConfig:
    """Return what is kept of a key. Pure.

    Raises:
        InvalidRequest: a bad name, tenant or lifetime.
    """
    if lifetime_s is not None and not 0 < lifetime_s <= _MAX_LIFETIME_S:
        raise InvalidRequest("lifetime_s", f"must be above 0 and at most {_MAX_LIFETIME_S}")
    kept = {
        "name": name,
        "sha256": hash_of(key),
        "tenant": tenant,
        "roles": roles or {Role.INFERENCE},
        "created_at": now,
        "expires_at": None if lifetime_s is None else now + timedelta(seconds=lifetime_s),
    }
    try:
        return ApiKeyConfig.model_validate(kept)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRequest(str(first["loc"][0]), first["msg"]) from error


class KeyRing:
    """Keys of one source, by fingerprint. Immutable: a change of the source makes a new ring."""

    def __init__(self, keys: Iterable[ApiKeyConfig] = ()) -> None:
        self._keys = {key.fingerprint: key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented_hash: str) -> ApiKeyConfig | None:
        """Return the key of this hash, valid or not."""
        key = self._keys.get(presented_hash[:FINGERPRINT_CHARACTERS])
        if key is None or not hmac.compare_digest(key.sha256, presented_hash):
            return None
        return key

    def all(self) -> list[ApiKeyConfig]:
        return list(self._keys.values())


def check_valid(key: ApiKeyConfig, now: datetime) -> None:
    """Raises: Unauthenticated, when the key was revoked or has expired."""
    if key.revoked_at is not None:
        raise Unauthenticated(AccessReason.KEY_REVOKED, "this API key was revoked")
    if key.is_expired(now):
        raise Unauthenticated(AccessReason.KEY_EXPIRED, "this API key has expired")
