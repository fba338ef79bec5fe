"""What a request claims in the gateway's queue: its place in the order, and what it takes of the bounds."""

from dataclasses import dataclass

from core.ids import RequestId
from core.request import GenerateRequest
from core.service_class import ServiceClass

RANK = {service_class: rank for rank, service_class in enumerate(ServiceClass)}  # 0 is served first

_BYTES_PER_TOKEN = 40  # a token id in a tuple, and its part of the block hashes
_BYTES_PER_REQUEST = 8_192  # machine, stream, timers and parameters


@dataclass(frozen=True, slots=True)
class Claim:
    """One request that wants to enter.

    Attributes:
        priority: among the tenant's own requests, larger first.
        deadline_s: after arrival, that the order heeds; None: none.
        arrived_at: on the gateway's clock; waiting counts from here.
        num_tokens: of the prompt.
        num_bytes: that it occupies while it waits; `claim_bytes` estimates it.
    """

    request_id: RequestId
    tenant: str
    service_class: ServiceClass
    priority: int
    deadline_s: float | None
    arrived_at: float
    num_tokens: int
    num_bytes: int
    expected_output_tokens: int

    @property
    def amount(self) -> "Amount":
        return Amount(1, self.num_tokens, self.num_bytes)


@dataclass(frozen=True, slots=True)
class Amount:
    """Of everything that the queue bounds."""

    num_requests: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def plus(self, other: "Amount") -> "Amount":
        return Amount(
            self.num_requests + other.num_requests,
            self.num_tokens + other.num_tokens,
            self.num_bytes + other.num_bytes,
        )

    def minus(self, other: "Amount") -> "Amount":
        return Amount(
            self.num_requests - other.num_requests,
            self.num_tokens - other.num_tokens,
            self.num_bytes - other.num_bytes,
        )


def claim_bytes(request: GenerateRequest) -> int:
    """Estimate what a request occupies. Pure."""
    sampling = request.sampling
    parameters = 64 * (len(sampling.stop_token_ids) + 2 * len(sampling.logit_bias)) + sum(map(len, sampling.stop))
    return _BYTES_PER_REQUEST + _BYTES_PER_TOKEN * request.num_prompt_tokens + parameters
