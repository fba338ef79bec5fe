"""API keys between the wire and `router.access`. Pure."""

from collections.abc import Iterable

from core.errors import InvalidRequest
from protos import admin_pb2 as pb
from router.access.config import ApiKeyConfig
from router.access.principal import Role

_ROLES = {pb.ACCESS_ROLE_INFERENCE: Role.INFERENCE, pb.ACCESS_ROLE_ADMIN: Role.ADMIN}
_WIRE = {role: wire for wire, role in _ROLES.items()}


def key_to_wire(key: ApiKeyConfig, source: str) -> pb.ApiKey:
    """Return what may be told of a key."""
    message = pb.ApiKey(
        fingerprint=key.fingerprint,
        name=key.name,
        tenant=key.tenant,
        roles=sorted(_WIRE[role] for role in key.roles),
        source=source,
    )
    for field in ("created_at", "expires_at", "revoked_at"):
        when = getattr(key, field)
        if when is not None:
            getattr(message, field).FromDatetime(when)
    return message


def roles_from_wire(roles: Iterable[pb.AccessRole.ValueType]) -> frozenset[Role]:
    """Return the roles; of none, inference. Raises: InvalidRequest, for one that there is not."""
    wanted = set(roles)
    unknown = wanted - _ROLES.keys()
    if unknown:
        raise InvalidRequest("roles", f"there is no role {min(unknown)}")
    return frozenset(_ROLES[role] for role in wanted) or frozenset({Role.INFERENCE})
