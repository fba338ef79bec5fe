"""Fixtures of tests that join several parts."""

from pathlib import Path

import pytest

from tests.fakes.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for fake workers; read only."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
