"""The parity table: every sampling and output feature, served in every way, equals the single engine's answer."""

import asyncio
from pathlib import Path

import pytest

from tests.parity.answers import distance
from tests.parity.features import FEATURES, Feature
from tests.parity.table import Table, is_exact, make_table
from tests.parity.ways import WAYS, Way

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.fixture(scope="module")
def table() -> Table:
    """Made once, and looked at cell by cell."""
    return asyncio.run(make_table())


@pytest.mark.parametrize("feature", [row for row in FEATURES if row.without], ids=lambda row: row.name)
def test_a_feature_does_something(table: Table, feature: Feature) -> None:
    assert table.right[feature.name] != table.plain[feature.name]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("feature", FEATURES, ids=lambda row: row.name)
def test_the_answer_is_the_single_engines(table: Table, feature: Feature, way: Way) -> None:
    cell = table.cells[way.name][feature.name]
    if cell.error is not None:
        raise cell.error
    assert cell.answer is not None
    problem, apart = distance(table.right[feature.name], cell.answer)
    assert not problem
    assert apart == 0.0 or not is_exact(way, feature)


def test_the_document_has_these_rows_and_columns() -> None:
    lines = DOCUMENT.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[0] == ["feature", *(way.name for way in WAYS)]
    assert [row[0] for row in rows[1:]] == [feature.name for feature in FEATURES]
    assert {cell for row in rows[1:] for cell in row[1:]} == {"exact", "equal"}
