"""Who a call is from: a name for logs, a tenant, roles. Pure."""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from core.errors import AccessReason, PermissionDenied


class Role(StrEnum):
    """What a caller may do."""

    INFERENCE = "inference"  # have its own requests served
    ADMIN = "admin"  # operate the cluster, and act for any tenant


@dataclass(frozen=True, slots=True)
class Principal:
    """One caller, admitted.

    Attributes:
        name: of the key, token or certificate, for logs. Never a secret.
        is_bound: to its tenant. False only where access control is off: a caller is then of any tenant it names.
    """

    name: str
    tenant: str
    roles: frozenset[Role]
    is_bound: bool = True

    def require(self, role: Role) -> None:
        """Raises: PermissionDenied, unless the caller has this role."""
        if role not in self.roles:
            raise PermissionDenied(AccessReason.MISSING_ROLE, f"this needs the role {role}", self.name)

    def tenant_for(self, asked: str) -> str:
        """Return the tenant that a request is on the account of.

        Args:
            asked: what the request names; empty: nothing.

        Raises:
            PermissionDenied: it names another tenant than the caller's, who is no admin.
        """
        if not self.is_bound:
            return asked
        if not asked or asked == self.tenant:
            return self.tenant
        if Role.ADMIN not in self.roles:
            raise PermissionDenied(AccessReason.OTHER_TENANT, "only an admin may act for another tenant", self.name)
        return asked


ANYONE = Principal("anyone", "", frozenset(Role), is_bound=False)
"""Every caller, where access control is off."""

_current: ContextVar[Principal] = ContextVar("tandem_principal")


def current_principal() -> Principal:
    """Return whom the surface admitted for the call that runs now.

    Raises:
        PermissionDenied: nobody was admitted in this context; whatever forgot to ask fails closed.
    """
    principal = _current.get(None)
    if principal is None:
        raise PermissionDenied(AccessReason.MISSING_ROLE, "this call was not admitted")
    return principal


def set_current_principal(principal: Principal) -> None:
    """Say whom this call, and whatever it starts, is from. For the surfaces' doors."""
    _current.set(principal)
