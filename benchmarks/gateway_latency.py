"""When tokens left against when they came. Both processes read the same clock: CLOCK_MONOTONIC of one machine. Pure."""

from collections.abc import Mapping, Sequence

Stream = tuple[str, float, float, list[tuple[float, int]]]
"""Request id, when it was asked, when its first token came, and (when, how many tokens there were then)."""


def added_ms(streams: Sequence[Stream], sent_at: Mapping[str, Sequence[float]]) -> list[float]:
    """Return for each token but the first how long after it left the worker its client had it, in milliseconds.

    Raises:
        ValueError: a client has more tokens than the worker sent.
    """
    found = []
    for request_id, _, _, events in streams:
        times, at = sent_at[request_id], 0
        for now, num_tokens in events:
            if num_tokens > len(times):
                raise ValueError(f"{request_id}: {num_tokens} tokens came and {len(times)} left")
            found += [1000 * (now - times[index]) for index in range(max(at, 1), num_tokens)]
            at = num_tokens
    return found


def ttfts_ms(streams: Sequence[Stream]) -> list[float]:
    """Return each stream's time to its first token, in milliseconds."""
    return [1000 * (first_at - asked_at) for _, asked_at, first_at, _ in streams if first_at]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the value that so many percent are not above, of three decimals; None of no values."""
    ordered = sorted(values)
    return round(ordered[int((len(ordered) - 1) * percent / 100)], 3) if ordered else None
