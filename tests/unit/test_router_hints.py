"""Headers and metadata that say how a call is to be served."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from core.request import SamplingParams
from core.service_class import ServiceClass, Slo
from router.hints import DESCRIPTIONS, NO_HINTS, Hints, read_hints, with_hints
from router.intake import GenerateCall, TextPrompt
from router.kv_terms import KvWish
from router.service_terms import ServiceWish

CALL = GenerateCall("", "", TextPrompt("hi"), SamplingParams(), has_max_tokens=False, has_seed=False)


def service(**fields: Any) -> Hints:
    return Hints(service=ServiceWish(**fields))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("x-request-id", "mine:1", Hints(request_id="mine:1")),
        ("X_Request_ID", "mine", Hints(request_id="mine")),
        ("x-session-id", "a session", service(session_id="a session")),
        ("x_session-id", "s", service(session_id="s")),
        ("x-tandem-tenant", "acme", Hints(tenant="acme")),
        ("x-llm-d-inference-fairness-id", "acme", Hints(tenant="acme")),
        ("x-tandem-priority", "-10", service(priority=-10)),
        ("x-tandem-priority", "+3", service(priority=3)),
        ("x-tandem-class", "Batch", service(service_class=ServiceClass.BATCH)),
        ("x-slo-ttft-ms", "250", service(slo=Slo(ttft_s=0.25))),
        ("x-llm-d-slo-ttft-ms", "250.5", service(slo=Slo(ttft_s=0.2505))),
        ("x-slo-tpot-ms", "20", service(slo=Slo(tpot_s=0.02))),
        ("x-llm-d-slo-tpot-ms", "20", service(slo=Slo(tpot_s=0.02))),
        ("x-deadline-ms", "9000", service(slo=Slo(deadline_s=9.0))),
        ("x-kv-quality", "High", Hints(kv=KvWish("high"))),
        ("x-kv-quality", "0.98", Hints(kv=KvWish(0.98))),
        ("x-handoff-budget-ms", "0", Hints(kv=KvWish(None, 0.0))),
        ("x-resume-window", "30", Hints(resume_window_s=30.0)),
        ("x-resume-window", "0", Hints(resume_window_s=0.0)),
        ("x-session-id", "  ", NO_HINTS),
        ("user-agent", "curl", NO_HINTS),
        ("traceparent", "00-nonsense", NO_HINTS),
    ],
)
def test_what_a_header_means(name: str, value: str, wanted: Hints) -> None:
    assert read_hints([(name, value)]) == wanted


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("x-request-id", "two words", "1 to 128 characters"),
        ("x-request-id", "a" * 129, "1 to 128 characters"),
        ("x-session-id", "é" * 129, "more than 256 bytes"),
        ("x-tandem-tenant", "a/b", "at most 64 characters"),
        ("x-tandem-priority", "11", "[-10, 10]"),
        ("x-tandem-priority", "high", "[-10, 10]"),
        ("x-tandem-priority", "1.0", "[-10, 10]"),
        ("x-tandem-class", "gold", "interactive, deadline, batch"),
        ("x-slo-ttft-ms", "0", "above 0"),
        ("x-slo-ttft-ms", "nan", "must be a number"),
        ("x-slo-ttft-ms", "inf", "must be a number"),
        ("x-slo-ttft-ms", "1e3", "must be a number"),
        ("x-slo-ttft-ms", "1_000", "must be a number"),
        ("x-llm-d-slo-tpot-ms", "-5", "must be a number"),
        ("x-deadline-ms", "1" * 400, "must be a number"),
        ("x-deadline-ms", "٣", "must be a number"),
        ("x-kv-quality", "best", "neither exact"),
        ("x-kv-quality", "1.5", "between 0 and 1"),
        ("x-handoff-budget-ms", "soon", "must be a number"),
        ("x-resume-window", "-1", "must be a number"),
    ],
)
def test_a_malformed_header_is_refused_by_its_name(name: str, value: str, problem: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_hints([(name, value)])
    assert refused.value.field == name
    assert problem in refused.value.problem


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_hints([("X-Slo-Ttft-Ms", "soon"), ("x_tandem_priority", "99"), ("x-session-id", "fine")])
    assert [field for field, _ in refused.value.violations] == ["x-slo-ttft-ms", "x-tandem-priority"]


def test_said_twice() -> None:
    assert read_hints([("x-session-id", "a"), ("X_SESSION_ID", "a")]) == service(session_id="a")
    with pytest.raises(InvalidRequest, match="x-session-id: is said twice"):
        read_hints([("x-session-id", "a"), ("x_session_id", "b")])


def test_our_name_is_heard_first_and_the_other_must_be_well_formed() -> None:
    both = [("x-llm-d-slo-ttft-ms", "900"), ("x-slo-ttft-ms", "100")]
    assert read_hints(both).service.slo.ttft_s == 0.1
    with pytest.raises(InvalidRequest, match="x-llm-d-slo-ttft-ms"):
        read_hints([("x-llm-d-slo-ttft-ms", "?"), ("x-slo-ttft-ms", "100")])


def test_binary_metadata_is_not_looked_at() -> None:
    assert read_hints([("x-session-id", b"bytes"), ("x-trace-bin", b"\xff")]) == NO_HINTS


SAID = Hints(
    request_id="header",
    service=ServiceWish(ServiceClass.BATCH, 1, Slo(1.0, 2.0, 3.0), "header"),
    kv=KvWish("high", 4.0),
    resume_window_s=5.0,
)
BODY = replace(
    CALL,
    request_id="body",
    service=ServiceWish(ServiceClass.DEADLINE, 0, Slo(0.1, 0.2, 0.3), "body"),
    kv=KvWish(0.0, 0.0),
    resume_window_s=0.0,
)


def test_headers_fill_what_the_body_left_open() -> None:
    assert with_hints(CALL, SAID) == replace(
        CALL, request_id="header", service=SAID.service, kv=SAID.kv, resume_window_s=5.0
    )
    assert with_hints(CALL, NO_HINTS) == CALL


def test_the_body_beats_headers_even_with_zeros() -> None:
    assert with_hints(BODY, SAID) == BODY


def test_part_by_part() -> None:
    half = replace(CALL, service=ServiceWish(None, None, Slo(ttft_s=0.1), ""), kv=KvWish(None, 7.0))
    filled = with_hints(half, SAID)
    assert filled.service == ServiceWish(ServiceClass.BATCH, 1, Slo(0.1, 2.0, 3.0), "header")
    assert filled.kv == KvWish("high", 7.0)


@given(st.lists(st.tuples(st.sampled_from(sorted(DESCRIPTIONS)), st.text(max_size=20))))
def test_any_values_are_understood_or_refused_by_name(headers: list[tuple[str, str]]) -> None:
    refused: list[str] = []
    with contextlib.suppress(InvalidRequest):
        try:
            read_hints(headers)
        except InvalidRequest as error:
            refused = [field for field, _ in error.violations]
            raise
    assert set(refused) <= {name for name, _ in headers}
