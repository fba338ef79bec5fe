"""What a call's headers say beside its body: who asks, what for, by when. The same words over HTTP and gRPC. Pure.

`-` and `_` are the same, and so is upper and lower case; what is not named here is not looked at. Where several names
mean the same, ours is heard first, then those that other systems' clients send. What the body says beats all of them.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from core.errors import InvalidRequest
from core.ids import parse_request_id, parse_tenant
from core.kv_quality import quality_floor
from core.service_class import ServiceClass, Slo
from core.violations import Violations
from router.intake import GenerateCall
from router.kv_terms import KvWish
from router.service_terms import MAX_PRIORITY, MAX_SESSION_ID_BYTES, ServiceWish

REQUEST_ID = ("x-request-id",)
SESSION = ("x-session-id",)
TENANT = ("x-tandem-tenant", "x-llm-d-inference-fairness-id")
PRIORITY = ("x-tandem-priority",)
CLASS = ("x-tandem-class",)
TTFT_MS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
TPOT_MS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
DEADLINE_MS = ("x-deadline-ms", "x-slo-deadline-ms")
KV_QUALITY = ("x-kv-quality",)
HANDOFF_BUDGET_MS = ("x-handoff-budget-ms",)
RESUME_WINDOW_S = ("x-resume-window",)

DESCRIPTIONS: Mapping[str, str] = {
    REQUEST_ID[0]: "the id of the request, new among those in flight; absent: one is made",
    SESSION[0]: "requests of one session go to the same workers while that costs nothing",
    TENANT[0]: "on whose account; with access control only an admin may name another",
    PRIORITY[0]: f"against the tenant's own requests, -{MAX_PRIORITY} to {MAX_PRIORITY}, larger first",
    CLASS[0]: f"{', '.join(ServiceClass)}; absent: the tenant's",
    TTFT_MS[0]: "target: milliseconds from arrival to the first token",
    TPOT_MS[0]: "target: milliseconds per token after the first",
    DEADLINE_MS[0]: "target: milliseconds from arrival to the last token",
    KV_QUALITY[0]: "of the KV cache on its way between workers: exact, high, balanced, or a number in [0, 1]",
    HANDOFF_BUDGET_MS[0]: "the KV cache may arrive so many milliseconds after the first token",
    RESUME_WINDOW_S[0]: "seconds for which a stream goes on without its connection, to be resumed; absent, 0: it ends",
}
"""For documents. Every hint by its first name."""

_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?\Z")
_WHOLE = re.compile(r"[+-]?[0-9]{1,4}\Z")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hints:
    """What was said; what was not is None or empty.

    Attributes:
        tenant: who asks decides whether it may be named.
        resume_window_s: 0: the call says that it is not resumable.
    """

    request_id: str = ""
    tenant: str = ""
    service: ServiceWish = ServiceWish()  # noqa: RUF009 - frozen
    kv: KvWish = KvWish()  # noqa: RUF009 - frozen
    resume_window_s: float | None = None


NO_HINTS = Hints()


def read_hints(headers: Iterable[tuple[str, str | bytes]]) -> Hints:
    """Return what headers, or metadata, ask for. Values that are bytes are nobody's text, and not looked at.

    Raises:
        InvalidRequest: one or several are malformed, or said twice and not the same; the fields are their names.
    """
    said = _Said()
    for name, value in headers:
        if isinstance(value, str):
            said.add(name.lower().replace("_", "-"), value.strip())
    if not said:
        return NO_HINTS
    slo = Slo(
        said.read(TTFT_MS, _target_s),
        said.read(TPOT_MS, _target_s),
        said.read(DEADLINE_MS, _target_s),
    )
    service = ServiceWish(
        said.read(CLASS, _service_class), said.read(PRIORITY, _priority), slo, said.read(SESSION, _session) or ""
    )
    hints = Hints(
        request_id=said.read(REQUEST_ID, parse_request_id) or "",
        tenant=said.read(TENANT, parse_tenant) or "",
        service=service,
        kv=KvWish(said.read(KV_QUALITY, _quality), said.read(HANDOFF_BUDGET_MS, _seconds)),
        resume_window_s=said.read(RESUME_WINDOW_S, _number),
    )
    said.check()
    return hints


def with_hints(call: GenerateCall, hints: Hints) -> GenerateCall:
    """Return the call with what its body left open taken from its headers. Its tenant is the door's to say."""
    body, said = call.service, hints.service
    service = ServiceWish(
        said.service_class if body.service_class is None else body.service_class,
        said.priority if body.priority is None else body.priority,
        Slo(
            said.slo.ttft_s if body.slo.ttft_s is None else body.slo.ttft_s,
            said.slo.tpot_s if body.slo.tpot_s is None else body.slo.tpot_s,
            said.slo.deadline_s if body.slo.deadline_s is None else body.slo.deadline_s,
        ),
        body.session_id or said.session_id,
    )
    kv = KvWish(
        hints.kv.quality if call.kv.quality is None else call.kv.quality,
        hints.kv.handoff_budget_s if call.kv.handoff_budget_s is None else call.kv.handoff_budget_s,
    )
    window_s = hints.resume_window_s if call.resume_window_s is None else call.resume_window_s
    request_id = call.request_id or hints.request_id
    return replace(call, request_id=request_id, service=service, kv=kv, resume_window_s=window_s)


class _Said:
    """The headers that mean something here."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._found = Violations()

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, name: str, value: str) -> None:
        if name not in _NAMES or not value:
            return
        if self._values.setdefault(name, value) != value:
            self._found.add(name, "is said twice, and not the same")

    def read(self, names: tuple[str, ...], parse: Callable[[str], T]) -> T | None:
        """Return the value of the first of these that is there; every one that is there must be well-formed."""
        read = None
        for name in names:
            if name not in self._values:
                continue
            try:
                value = parse(self._values[name])
            except InvalidRequest as error:
                self._found.add(name, error.problem)
            else:
                read = value if read is None else read
        return read

    def check(self) -> None:
        self._found.check()


_NAMES = frozenset(
    name
    for names in (
        REQUEST_ID, SESSION, TENANT, PRIORITY, CLASS, TTFT_MS, TPOT_MS, DEADLINE_MS, KV_QUALITY, HANDOFF_BUDGET_MS,
        RESUME_WINDOW_S,
    )
    for name in names
)  # fmt: skip


def _number(text: str) -> float:
    if not _NUMBER.match(text):
        raise InvalidRequest("", f"must be a number, at least 0, got {text[:32]!r}")
    return float(text)


def _seconds(milliseconds: str) -> float:
    return _number(milliseconds) / 1000


def _target_s(milliseconds: str) -> float:
    seconds = _seconds(milliseconds)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InvalidRequest("", "must be above 0")
    return seconds


def _priority(text: str) -> int:
    if not _WHOLE.match(text) or abs(int(text)) > MAX_PRIORITY:
        raise InvalidRequest("", f"must be a whole number in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {text[:32]!r}")
    return int(text)


def _service_class(text: str) -> ServiceClass:
    try:
        return ServiceClass(text.lower())
    except ValueError as error:
        raise InvalidRequest("", f"must be one of {', '.join(ServiceClass)}, got {text[:32]!r}") from error


def _session(text: str) -> str:
    if len(text.encode(errors="replace")) > MAX_SESSION_ID_BYTES:
        raise InvalidRequest("", f"has more than {MAX_SESSION_ID_BYTES} bytes")
    return text


def _quality(text: str) -> str | float:
    word = text.lower()
    try:
        floor = quality_floor(word)
    except ValueError as error:
        raise InvalidRequest("", str(error)[:128]) from error
    return floor if _NUMBER.match(word) else word
