"""API keys as the client hands them out."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from core.errors import InvalidRequest
from protos import admin_pb2 as pb

_ROLES = {"inference": pb.ACCESS_ROLE_INFERENCE, "admin": pb.ACCESS_ROLE_ADMIN}
_NAMES = {wire: name for name, wire in _ROLES.items()}


@dataclass(frozen=True, slots=True)
class KnownKey:
    """What is known of an API key. `fingerprint`: the first digits of its hash; `source`: config, file or shared."""

    fingerprint: str
    name: str
    tenant: str
    roles: tuple[str, ...]
    created_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    source: str


def create_request(name: str, tenant: str, roles: Iterable[str], lifetime_s: float | None) -> pb.CreateApiKeyRequest:
    """Raises: InvalidRequest, for a role that there is not."""
    wanted = list(roles)
    unknown = [role for role in wanted if role not in _ROLES]
    if unknown:
        raise InvalidRequest("roles", f"must be of {', '.join(_ROLES)}, got {unknown[0]!r}")
    return pb.CreateApiKeyRequest(
        name=name, tenant=tenant, roles=[_ROLES[role] for role in wanted], lifetime_s=lifetime_s
    )


def known_key_of(key: pb.ApiKey) -> KnownKey:
    created, expires, revoked = (
        getattr(key, field).ToDatetime(UTC) if key.HasField(field) else None
        for field in ("created_at", "expires_at", "revoked_at")
    )
    roles = tuple(_NAMES.get(role, str(role)) for role in key.roles)
    return KnownKey(key.fingerprint, key.name, key.tenant, roles, created, expires, revoked, key.source)
