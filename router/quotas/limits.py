"""A tenant's quotas as what is asked of the store. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from core.token_bucket import BucketTake
from router.config import TenantConfig


class Quota(StrEnum):
    """What is counted, and the last part of its key in the store."""

    REQUESTS = "requests per minute"
    TOKENS = "tokens per minute"
    CONCURRENCY = "requests at once"


_KEYS = {Quota.REQUESTS: "rpm", Quota.TOKENS: "tpm", Quota.CONCURRENCY: "slots"}


@dataclass(frozen=True, slots=True)
class TenantQuotas:
    """Quotas of one tenant; None: unlimited."""

    tenant: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None

    @classmethod
    def of(cls, tenant: str, config: TenantConfig) -> "TenantQuotas | None":
        """Return None when nothing is limited."""
        limits = (config.requests_per_minute, config.tokens_per_minute, config.max_concurrent_requests)
        return None if limits == (None, None, None) else cls(tenant, *limits)

    def takes(self, prefix: str, burst_s: float, *, requests: float, tokens: float) -> dict[Quota, BucketTake]:
        """Return what taking so many requests and tokens is, for those of them that are limited."""
        wanted = {
            Quota.REQUESTS: (self.requests_per_minute, requests),
            Quota.TOKENS: (self.tokens_per_minute, tokens),
        }
        return {
            quota: BucketTake(key(prefix, self.tenant, quota), amount, max(1.0, limit / 60.0 * burst_s), limit / 60.0)
            for quota, (limit, amount) in wanted.items()
            if limit is not None and amount
        }


def key(prefix: str, tenant: str, quota: Quota) -> str:
    """Return where it is counted. The braces keep a tenant's keys together in a store that is spread over nodes."""
    return f"{prefix}{{{tenant}}}:{_KEYS[quota]}"
