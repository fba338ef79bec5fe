"""The lower envelope: which arms can be the fastest at any bandwidth at all.

In x = 1/B an arm is a line: its codec time, plus x times its bytes on the wire. Where a line is nowhere the lowest, its
arm need not be considered; the others follow each other along x in the order of their ratios.

Source: KVServe, theorem 2 (reference/kv_transfer.md 1.4); the hull is Andrew's monotone chain.
"""

from collections.abc import Sequence

Line = tuple[float, float]
"""Intercept and slope."""


def lower_envelope(lines: Sequence[Line]) -> list[int]:
    """Return the indices of the lines that are the lowest somewhere on x >= 0, by growing x. Pure.

    Args:
        lines: by falling slope, as arms are by growing ratio. Of equal slopes only the lowest line counts.
    """
    hull: list[int] = []
    for idx, (intercept, slope) in enumerate(lines):
        while hull:
            last_intercept, last_slope = lines[hull[-1]]
            if intercept <= last_intercept:  # lower at 0 and not steeper: the last one is nowhere below it
                hull.pop()
                continue
            if slope >= last_slope:
                break  # parallel and above
            if len(hull) > 1:
                before_intercept, before_slope = lines[hull[-2]]
                # The last line is needed only if it takes over before this one does.
                takes_over = (last_intercept - before_intercept) * (before_slope - slope)
                if takes_over >= (intercept - before_intercept) * (before_slope - last_slope):
                    hull.pop()
                    continue
            hull.append(idx)
            break
        else:
            hull.append(idx)
    return hull
