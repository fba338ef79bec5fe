"""What a client asks for, completed by what its tenant and the class say."""

import math
from pathlib import Path

import pytest

from core.errors import InvalidRequest
from core.service_class import NO_SLO, ServiceClass, Slo
from router.admission.config import AdmissionConfig, ClassConfig
from router.config import RouterConfig, TenantConfig
from router.service_terms import NO_SERVICE_WISH, ServiceTerms, ServiceWish, service_terms

CONFIG = RouterConfig(
    model_path=Path("nowhere"),
    tenants={"night": TenantConfig(service_class=ServiceClass.BATCH)},
    admission=AdmissionConfig(
        interactive=ClassConfig(ttft_s=1.0, tpot_s=0.1), deadline=ClassConfig(deadline_s=60.0), batch=ClassConfig()
    ),
)


@pytest.mark.parametrize(
    ("wish", "tenant", "expected"),
    [
        pytest.param(
            NO_SERVICE_WISH, "", ServiceTerms(ServiceClass.INTERACTIVE, 0, Slo(1.0, 0.1, None), ""), id="defaults"
        ),
        pytest.param(NO_SERVICE_WISH, "night", ServiceTerms(ServiceClass.BATCH, 0, NO_SLO, ""), id="of the tenant"),
        pytest.param(
            ServiceWish(ServiceClass.DEADLINE, 3, Slo(deadline_s=9.0), "s"),
            "night",
            ServiceTerms(ServiceClass.DEADLINE, 3, Slo(deadline_s=9.0), "s"),
            id="asked for",
        ),
        pytest.param(
            ServiceWish(slo=Slo(ttft_s=7.0)),
            "",
            ServiceTerms(ServiceClass.INTERACTIVE, 0, Slo(7.0, 0.1, None), ""),
            id="each target by itself",
        ),
    ],
)
def test_what_holds(wish: ServiceWish, tenant: str, expected: ServiceTerms) -> None:
    assert service_terms(wish, tenant, CONFIG) == expected


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        (ServiceWish(priority=11), "priority"),
        (ServiceWish(priority=-11), "priority"),
        (ServiceWish(slo=Slo(ttft_s=0.0)), "slo.ttft_s"),
        (ServiceWish(slo=Slo(tpot_s=math.nan)), "slo.tpot_s"),
        (ServiceWish(slo=Slo(deadline_s=math.inf)), "slo.deadline_s"),
        (ServiceWish(session_id="é" * 129), "session_id"),
    ],
)
def test_a_wish_out_of_range_is_named(wish: ServiceWish, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        service_terms(wish, "", CONFIG)
    assert refused.value.field == field
