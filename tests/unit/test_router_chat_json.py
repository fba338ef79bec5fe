"""How deep a JSON text is, found without recursion."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequest
from router.chat.json_text import depth_of, read_object

texts = st.text(alphabet='a"\\[]{}:,é\n', max_size=8)
values = st.recursive(
    st.none() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@settings(deadline=None)
@given(values, st.booleans())
def test_it_is_the_depth_of_the_value(value: Any, is_ascii: bool) -> None:
    assert depth_of(json.dumps(value, ensure_ascii=is_ascii)) == depth(value)


@settings(deadline=None)
@given(st.dictionaries(texts, values, max_size=3))
def test_objects_are_read(value: dict[str, Any]) -> None:
    assert read_object("f", json.dumps(value), 50) == value


@pytest.mark.parametrize(
    "text",
    ["[" * 1_000_000, '{"a":' * 1_000_000, '"' * 1_000_001, '{"' + "\\" * 1_000_001, "", "[]", '{"a": Infinity}', "{"],
)
def test_what_is_no_object_is_refused(text: str) -> None:
    """Also what would make a parser recurse a million times, or look back from every quote."""
    with pytest.raises(InvalidRequest) as error:
        read_object("f", text, 64)
    assert error.value.field == "f"
    assert len(str(error.value)) < 200
