"""The whole table: what is right, what every way gave, and how it reads."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.parity.answers import TOLERANCE, Answer, Distance, distance
from tests.parity.features import FEATURES, Feature
from tests.parity.single import SingleEngine
from tests.parity.ways import WAYS, Cell, Way, serve

_TITLE = """# Parity: the same answer, however it is served

Written by `python -m tests.parity docs/parity.md`; the comparison is the one that `tests/integration/test_parity.py`
makes. Each row is asked of a single engine in one process, one request at a time and without a prefix cache, and then
over gRPC of gateways before real prefill and decode processes (models/tiny, float32, one thread per engine, chunks of
64 tokens). Compared are token ids, text, finish reason, matched stop, tool calls and token counts, which must be equal,
and the log-probabilities of the tokens, of the prompt and of all alternatives.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """What is right and what was given.

    Attributes:
        right, plain: the single engine's answers by feature, with it and without it (where a row says what it is).
        cells: by way and feature.
    """

    right: Mapping[str, Answer]
    plain: Mapping[str, Answer]
    cells: Mapping[str, Mapping[str, Cell]]


async def make_table() -> Table:
    """Ask everybody for everything."""
    right: dict[str, Answer] = {}
    plain: dict[str, Answer] = {}
    asked: list[tuple[Feature, Mapping[str, Any]]] = []
    single = SingleEngine()
    try:
        for feature in FEATURES:
            options = await single.options(feature)
            asked.append((feature, options))
            right[feature.name] = await single.answer(feature, options)
            if feature.without:
                rest = {name: value for name, value in options.items() if name not in feature.without}
                plain[feature.name] = await single.answer(feature, {"max_tokens": 20, **rest})
    finally:
        await single.close()
    with tempfile.TemporaryDirectory(prefix="tandem-parity-") as folder:
        return Table(right, plain, await serve(asked, Path(folder)))


def markdown(table: Table) -> str:
    """Return the table as docs/parity.md has it."""
    lines = [_TITLE, f"| feature | {' | '.join(way.name for way in WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for feature in FEATURES:
        words = [_word(table, way, feature) for way in WAYS]
        lines.append(f"| {feature.name} | {' | '.join(words)} |")
    lines.append(
        "\nexact: equal to the last bit, log-probabilities included. equal: the same, and log-probabilities no farther"
        f"\napart than {TOLERANCE:g}: after a prefix hit, or in a batch, products have other numbers of rows, and"
        "\nfloat32 sums are taken in another order. In bfloat16 the same rounding is larger (up to 0.02 was seen), and"
        "\nturns near ties: there only `exact` ways promise equal tokens."
        "\n\nThe farthest apart in the run that wrote this:\n"
    )
    for way in WAYS:
        apart = max(_distance(table, way, feature)[1] for feature in FEATURES)
        lines.append(f"- {way.name}: {apart:.1e}")
    return "\n".join(lines) + "\n"


def is_exact(way: Way, feature: Feature) -> bool:
    """Whether even log-probabilities must be equal bit for bit. Further answers to one prompt find it in the cache."""
    return way.is_exact and feature.n == 1


def _distance(table: Table, way: Way, feature: Feature) -> Distance:
    cell = table.cells[way.name][feature.name]
    if cell.error is not None or cell.answer is None:
        return Distance(f"failed: {cell.error!r}", 0.0)
    return distance(table.right[feature.name], cell.answer)


def _word(table: Table, way: Way, feature: Feature) -> str:
    problem, apart = _distance(table, way, feature)
    if problem or (apart and is_exact(way, feature)):
        return "**differs**"
    return "exact" if is_exact(way, feature) else "equal"
