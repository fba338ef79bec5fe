"""The one place that decides who a caller is. Every surface asks it before anything else, in its own words.

It is given what the caller presented: the values of all authorization headers, and the names in the certificate that
TLS has verified. What it says of a refusal never repeats what was presented.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

from core.clock import Clock, MonotonicClock
from core.errors import AccessReason, ServingError, Unauthenticated
from router.access.config import AccessConfig, ApiKeyConfig
from router.access.jwks import KeySet
from router.access.keys import KeyRing, check_valid, hash_of
from router.access.principal import ANYONE, Principal, Role
from router.access.tokens import TokenJudge

CONFIG = "config"
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*) *\Z", re.IGNORECASE)  # RFC 6750, section 2.1
_TOKEN_DOTS = 2


class Gatekeeper:
    """Admits callers.

    Args:
        now: what time it is, for the expiry of keys.
        on_refused: told of every refusal.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self,
        config: AccessConfig,
        *,
        clock: Clock | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_refused: Callable[[ServingError], None] = lambda _: None,
    ) -> None:
        self.config = config
        self._now = now
        self._on_refused = on_refused
        self._rings: dict[str, KeyRing] = {CONFIG: KeyRing(config.keys)}
        self._tokens = TokenJudge(config.jwt, clock or MonotonicClock())
        self._certificates: Mapping[str, Principal] = {
            one.name: Principal(one.name, one.tenant, one.roles) for one in config.certificates
        }

    @property
    def issuers(self) -> list[KeySet]:
        """The public keys of those who issue tokens, to be kept fresh."""
        return self._tokens.key_sets

    async def admit(
        self, authorization: Sequence[str], certificate_names: Sequence[str] = (), *, role: Role | None = None
    ) -> Principal:
        """Return who the caller is.

        Args:
            authorization: the value of every authorization header of the call.
            certificate_names: of the verified certificate of the client; none without mutual TLS. They count only
                when there is no authorization header.
            role: that the caller must have; None: any will do.

        Raises:
            Unauthenticated: no credential, several, or one that is not valid.
            PermissionDenied: the caller has not this role.
            AccessUnavailable: whether a token is valid cannot be told now.
        """
        if not self.config.enabled:
            return ANYONE
        try:
            principal = await self._identify(authorization, certificate_names)
            if role is not None:
                principal.require(role)
        except ServingError as error:
            self._on_refused(error)
            raise
        return principal

    def replace_ring(self, source: str, ring: KeyRing) -> None:
        """From now on these are the keys of `source`."""
        self._rings[source] = ring

    def rings(self) -> Iterable[tuple[str, KeyRing]]:
        """Return the keys by source."""
        return self._rings.items()

    async def _identify(self, authorization: Sequence[str], certificate_names: Sequence[str]) -> Principal:
        if not authorization:
            known = [self._certificates[name] for name in certificate_names if name in self._certificates]
            if not known:
                raise Unauthenticated(
                    AccessReason.MISSING_CREDENTIAL, "no credential: send the header `authorization: Bearer <API key>`"
                )
            return known[0]
        credential = self._credential(authorization)
        key = self._find(hash_of(credential))
        if key is not None:
            check_valid(key, self._now())
            return Principal(key.name, key.tenant, key.roles)
        if self.config.jwt and credential.count(".") == _TOKEN_DOTS:
            return await self._tokens.admit(credential)
        raise Unauthenticated(AccessReason.INVALID_CREDENTIAL, "this API key is not valid here")

    def _credential(self, authorization: Sequence[str]) -> str:
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

    def _find(self, presented_hash: str) -> ApiKeyConfig | None:
        """A key that one source revoked is revoked, whatever the others say."""
        found = [key for ring in self._rings.values() if (key := ring.find(presented_hash)) is not None]
        return min(found, key=lambda key: key.revoked_at is None, default=None)
