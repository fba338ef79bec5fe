"""Which quality and budget hold for a request: the stricter of its own, or the cluster's, and its tenant's."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import parse_config
from core.errors import ConfigError, InvalidRequest
from core.kv_quality import FLOORS, quality_floor
from router.config import RouterConfig
from router.kv_terms import KvTerms, KvWish, kv_terms

CONFIG = parse_config(
    RouterConfig,
    {
        "model_path": Path("m"),
        "kv_quality": "high",
        "handoff_budget_s": 2.0,
        "tenants": {"bank": {"kv_quality": "exact"}, "lab": {"kv_quality": 0.9}, "guest": {}},
    },
    source="test",
)
QUALITIES = st.one_of(st.sampled_from(sorted(FLOORS)), st.floats(0, 1))


@pytest.mark.parametrize(
    ("wish", "tenant", "terms"),
    [
        (KvWish(), "", KvTerms(0.99, 2.0)),
        (KvWish("balanced"), "", KvTerms(0.97, 2.0)),
        (KvWish(0.5, 0.0), "", KvTerms(0.5, 0.0)),
        (KvWish("balanced"), "bank", KvTerms(1.0, 2.0)),
        (KvWish(), "lab", KvTerms(0.99, 2.0)),
        (KvWish(0.5), "lab", KvTerms(0.9, 2.0)),
        (KvWish(0.5), "guest", KvTerms(0.5, 2.0)),
        (KvWish(0.5), "never heard of", KvTerms(0.5, 2.0)),
    ],
    ids=["default", "a word", "numbers", "strict tenant", "lax tenant", "floored", "no floor", "unknown tenant"],
)
def test_the_stricter_holds(wish: KvWish, tenant: str, terms: KvTerms) -> None:
    assert kv_terms(wish, tenant, CONFIG) == terms


@given(quality=QUALITIES, tenant=st.sampled_from(["", "bank", "lab", "guest"]))
def test_a_tenant_only_ever_raises_the_floor(quality: str | float, tenant: str) -> None:
    alone = kv_terms(KvWish(quality), "", CONFIG).quality_floor
    assert alone == quality_floor(quality)
    assert kv_terms(KvWish(quality), tenant, CONFIG).quality_floor >= alone


@pytest.mark.parametrize("quality", ["perfect", "", -0.01, 1.01, float("nan"), float("inf")])
def test_what_is_no_quality_is_named(quality: str | float) -> None:
    with pytest.raises(InvalidRequest) as refused:
        kv_terms(KvWish(quality), "bank", CONFIG)
    assert refused.value.field == "kv_quality"


@pytest.mark.parametrize("value", ["perfect", 1.5, -1])
def test_a_configured_floor_is_checked(value: object) -> None:
    with pytest.raises(ConfigError, match=r"tenants\.bank\.kv_quality"):
        parse_config(RouterConfig, {"model_path": "m", "tenants": {"bank": {"kv_quality": value}}}, source="test")
