"""The table of `tandem profile decisions`. Pure."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tandem_client import KvDecision

_HEADINGS = ("from > to", "age", "KiB", "profile", "ratio", "why", "floor", "MB/s", "predicted", "observed", "tenant")
_NUMBERS = ("age", "KiB", "ratio", "floor", "MB/s", "predicted", "observed")


def decisions_table(decisions: Sequence[KvDecision]) -> Table:
    """Show one row per transfer; times in milliseconds but for the age."""
    table = Table(
        title="KV transfers (predicted and observed: reserved to acknowledged, ms; MB/s: of the link)",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", no_wrap=heading != "why")
    for one in decisions:
        table.add_row(
            f"{one.prefill_worker} > {one.peer}",
            f"{one.age_s:.0f} s",
            f"{one.raw_bytes / 1024:.0f}",
            one.profile,
            f"{one.raw_bytes / one.wire_bytes:.2f}" if one.wire_bytes else "-",
            f"{one.reason}; failed: {one.failure}" if one.failure else one.reason,
            f"{one.quality_floor:g}",
            f"{one.goodput_bytes_per_s / 1e6:.0f}",
            _ms(one.predicted_s),
            _ms(one.observed_s),
            one.tenant or "-",
        )
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
