"""Rows of a comparison as text. Pure."""

from collections.abc import Sequence

from simulator.comparison import Row
from simulator.confidence import Estimate

DEFAULT_COLUMNS = ("ttft_s", "ttft_p50_s", "ttft_p99_s", "tpot_s", "mooncake", "missed", "hit_ratio", "asked")


def cell(found: Estimate) -> str:
    """Three digits of the mean; the interval where there is one."""
    if found.count == 1:
        return f"{found.mean:.3g}"
    return f"{found.mean:.3g} ± {found.half:.2g}"


def table(rows: Sequence[Row], columns: Sequence[str] = DEFAULT_COLUMNS) -> list[str]:
    """Return lines of a Markdown table: an arm per row, a value per column."""
    cells = [["", *columns]]
    cells += [[row.arm, *(cell(row.estimate(column)) for column in columns)] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns) + 1)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]
