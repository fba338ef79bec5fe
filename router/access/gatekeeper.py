"""The one place that decides who a caller is. Every surface asks it before anything else, in its own words.

It is given what the caller presented: the values of all authorization headers, and the names in the certificate that
TLS has verified. What it says of a refusal never repeats what was presented.
"""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from core.errors import AccessReason, Unauthenticated
from router.access.config import AccessConfig, ApiKeyConfig
from router.access.keys import KeyRing, check_valid, hash_of
from router.access.principal import ANYONE, Principal

_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*) *\Z", re.IGNORECASE)  # RFC 6750, section 2.1


class Gatekeeper:
    """Admits callers.

    Args:
        now: what time it is, for expiry.

    Concurrency: the event loop's thread.
    """

    def __init__(self, config: AccessConfig, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.config = config
        self._now = now
        self._rings: dict[str, KeyRing] = {"config": KeyRing(config.keys)}

    async def admit(self, authorization: Sequence[str], certificate_names: Sequence[str] = ()) -> Principal:
        """Return who the caller is.

        Args:
            authorization: the value of every authorization header of the call.
            certificate_names: of the verified certificate of the client; none without mutual TLS.

        Raises:
            Unauthenticated: no credential, several, or one that is not valid.
        """
        if not self.config.enabled:
            return ANYONE
        return self._admit_key(self._credential(authorization))

    def replace_ring(self, source: str, ring: KeyRing) -> None:
        """From now on these are the keys of `source`."""
        self._rings[source] = ring

    def _credential(self, authorization: Sequence[str]) -> str:
        if not authorization:
            raise Unauthenticated(
                AccessReason.MISSING_CREDENTIAL, "no credential: send the header `authorization: Bearer <API key>`"
            )
        if len(authorization) > 1:
            raise Unauthenticated(AccessReason.MALFORMED_CREDENTIAL, "several authorization headers")
        if len(authorization[0]) > self.config.max_credential_bytes:
            limit = self.config.max_credential_bytes
            raise Unauthenticated(AccessReason.MALFORMED_CREDENTIAL, f"the credential has more than {limit} bytes")
        match = _BEARER.match(authorization[0])
        if match is None:
            raise Unauthenticated(
                AccessReason.MALFORMED_CREDENTIAL, "the authorization header must be `Bearer` and one credential"
            )
        return match[1]

    def _admit_key(self, credential: str) -> Principal:
        key = self._find(hash_of(credential))
        if key is None:
            raise Unauthenticated(AccessReason.INVALID_CREDENTIAL, "this API key is not valid here")
        check_valid(key, self._now())
        return Principal(key.name, key.grant.tenant, key.grant.roles)

    def _find(self, presented_hash: str) -> ApiKeyConfig | None:
        """A key that one source revoked is revoked, whatever the others say."""
        found = [key for ring in self._rings.values() if (key := ring.find(presented_hash)) is not None]
        return min(found, key=lambda key: key.revoked_at is None, default=None)
