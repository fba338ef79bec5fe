"""Our root packages have generic names: they must be ours, here, and nobody else's."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
OURS = {"tandem"}


def test_the_shipped_packages_are_found() -> None:
    shipped = {"cluster", "core", "decode_workers", "engine", "kv_transfer", "prefill_workers", "protos", "router"}
    assert shipped | {"workers"} <= set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_root_package_resolves_inside_the_repository(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("name", PACKAGES)
def test_no_other_distribution_provides_the_name(name: str) -> None:
    providers = set(importlib.metadata.packages_distributions().get(name, ()))
    assert providers <= OURS
