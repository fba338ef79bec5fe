"""What a request is for and by when it is wanted, under what its tenant and the cluster say. Pure."""

import math
from dataclasses import dataclass

from core.errors import InvalidRequest
from core.service_class import NO_SLO, ServiceClass, Slo
from router.config import RouterConfig

MAX_PRIORITY = 10
MAX_SESSION_ID_BYTES = 256


@dataclass(frozen=True, slots=True)
class ServiceWish:
    """As the client said it; None and "": nothing was said."""

    service_class: ServiceClass | None = None
    priority: int | None = None
    slo: Slo = NO_SLO
    session_id: str = ""


NO_SERVICE_WISH = ServiceWish()


@dataclass(frozen=True, slots=True)
class ServiceTerms:
    """What holds.

    Attributes:
        priority: among the tenant's own requests, larger first; [-10, 10].
        session_id: requests of one session go to the same workers while that costs nothing; empty: none.
    """

    service_class: ServiceClass
    priority: int
    slo: Slo
    session_id: str


PLAIN_SERVICE = ServiceTerms(ServiceClass.INTERACTIVE, 0, NO_SLO, "")


def service_terms(wish: ServiceWish, tenant: str, config: RouterConfig) -> ServiceTerms:
    """Return the client's wish, completed by its tenant's class and that class's targets. Pure.

    Raises:
        InvalidRequest: the wish is out of range.
    """
    priority = wish.priority or 0
    if abs(priority) > MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {priority}")
    if len(wish.session_id.encode(errors="replace")) > MAX_SESSION_ID_BYTES:
        raise InvalidRequest("session_id", f"has more than {MAX_SESSION_ID_BYTES} bytes")
    service_class = config.tenant(tenant).service_class if wish.service_class is None else wish.service_class
    default = config.admission.of(service_class).slo
    slo = Slo(
        _target("ttft_s", wish.slo.ttft_s, default.ttft_s),
        _target("tpot_s", wish.slo.tpot_s, default.tpot_s),
        _target("deadline_s", wish.slo.deadline_s, default.deadline_s),
    )
    return ServiceTerms(service_class, priority, slo, wish.session_id)


def _target(name: str, asked_s: float | None, default_s: float | None) -> float | None:
    if asked_s is None:
        return default_s
    if not (asked_s > 0.0 and math.isfinite(asked_s)):
        raise InvalidRequest(f"slo.{name}", f"must be above 0 and finite, got {asked_s!r}")
    return asked_s
