"""What every test of a real cluster asks for, and the right answers."""

import pytest

from tests.e2e.generations import by_transformers, make_prompts


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return make_prompts()


@pytest.fixture(scope="session")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """Of each prompt, what `transformers` generates greedily."""
    return by_transformers(prompts)
