"""The ways to serve a request (DESIGN 1), and why one was taken. Both words reach the client in `Placement`."""

from enum import StrEnum


class Mode(StrEnum):
    """Who computes what."""

    REMOTE_PREFILL = "remote_prefill"  # a prefill worker, then its KV goes to a decode worker
    LOCAL_PREFILL = "local_prefill"  # the decode worker holds enough of the prefix to do the rest itself
    COLOCATED = "colocated"  # one worker does both


class ModeReason(StrEnum):
    """Why this mode."""

    CHEAPEST = "cheapest"  # by the one cost, among all modes that were possible
    PREFIX_AT_DECODE = "prefix_at_decode"  # the decode worker holds the prefix, and the rest is short
    NO_PREFILL_POOL = "no_prefill_pool"  # no prefill worker can be asked
    NO_DECODE_POOL = "no_decode_pool"  # no decode worker can be asked
    FIRST_TOKEN_IS_LAST = "first_token_is_last"  # nothing is left to decode
    ONLY_POSSIBLE = "only_possible"  # configuration or limits leave no other


class Binding(StrEnum):
    """When the decode worker of a remote prefill is chosen."""

    EARLY = "early"  # before the prefill begins: its KV is sent while it computes
    LATE = "late"  # while the prefill computes: nobody has room now, but will
