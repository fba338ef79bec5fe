"""Names of the things that cross process borders. Pure strings, told apart by their types."""

import random
import re
import secrets
from typing import NewType

from core.errors import InvalidRequest

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
TransferId = NewType("TransferId", str)
"""Minted by the router, one per attempt to hand a request over; both workers are given the same one."""
GatewayId = NewType("GatewayId", str)
Epoch = NewType("Epoch", int)
"""Incarnation of a worker: grows by one at every start; a message from an older epoch is refused."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}\Z")
_TENANT = re.compile(r"[A-Za-z0-9_.:-]{0,64}\Z")


def new_request_id() -> RequestId:
    """Return a fresh random request id (96 bits)."""
    return RequestId(f"req-{secrets.token_hex(12)}")


def new_gateway_id() -> GatewayId:
    """Return a fresh random gateway id: a restarted gateway is a new one, by design."""
    return GatewayId(f"gw-{secrets.token_hex(6)}")


def new_nonce(rng: random.Random) -> str:
    """Draw what tells one admission of a request id from another (32 bits): clients use their ids again, and at
    several gateways at once, while workers remember for a while what has ended."""
    return f"{rng.getrandbits(32):08x}"


def transfer_id(request_id: RequestId, attempt: int, nonce: str) -> TransferId:
    """Name attempt number `attempt` (from 0) to hand over `request_id`, in the admission that drew `nonce`.

    At most 128 characters of the id and 20 more, below what a KV frame has room for.
    """
    return TransferId(f"{request_id}/{attempt}.{nonce}")


def parse_request_id(text: str) -> RequestId:
    """Check a client's own request id.

    Raises:
        InvalidRequest: it is longer than 128 characters or holds characters outside ``[A-Za-z0-9_.:-]``.
    """
    if not _REQUEST_ID.match(text):
        raise InvalidRequest("request_id", "must be 1 to 128 characters of [A-Za-z0-9_.:-]")
    return RequestId(text)


def parse_tenant(text: str) -> str:
    """Check the name of a tenant; none at all is a tenant too.

    Raises:
        InvalidRequest: it is longer than 64 characters or holds characters outside ``[A-Za-z0-9_.:-]``.
    """
    if not _TENANT.match(text):
        raise InvalidRequest("tenant", "must be at most 64 characters of [A-Za-z0-9_.:-]")
    return text
