"""Pages name programs and other pages that are there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_program_and_page_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ([\w.]+\w)", text))
    assert {name for name in modules if importlib.util.find_spec(name) is None} == set()
    pages = set(re.findall(r"`(docs/[\w./-]+\.md)`", text))
    assert {name for name in pages if not (ROOT / name).exists()} == set()
