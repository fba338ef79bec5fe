"""What a request asks of the transfer of its KV, under what its tenant and the cluster say. Pure."""

from dataclasses import dataclass

from core.errors import InvalidRequest
from core.kv_quality import quality_floor
from router.config import RouterConfig


@dataclass(frozen=True, slots=True)
class KvWish:
    """As the client said it; None: nothing was said. `quality`: a word or a number of `core.kv_quality`."""

    quality: str | float | None = None
    handoff_budget_s: float | None = None


NO_WISH = KvWish()


@dataclass(frozen=True, slots=True)
class KvTerms:
    """What holds. `quality_floor` in [0, 1]."""

    quality_floor: float
    handoff_budget_s: float | None


def kv_terms(wish: KvWish, tenant: str, config: RouterConfig) -> KvTerms:
    """Return the stricter of the request's quality (or the cluster's default) and the tenant's. Pure.

    Raises:
        InvalidRequest: the wish is out of range.
    """
    budget_s = config.handoff_budget_s if wish.handoff_budget_s is None else wish.handoff_budget_s
    if budget_s is not None and not 0.0 <= budget_s < float("inf"):
        raise InvalidRequest("handoff_budget_s", f"must be at least 0 and finite, got {budget_s!r}")
    try:
        floor = quality_floor(config.kv_quality if wish.quality is None else wish.quality)
    except ValueError as error:
        raise InvalidRequest("kv_quality", str(error)) from error
    own = config.tenant(tenant)
    if own.kv_quality is not None:
        floor = max(floor, quality_floor(own.kv_quality))
    return KvTerms(floor, budget_s)
