"""What a request is for, and what it was promised: the words in which admission, routing and measuring speak of it."""

from dataclasses import dataclass
from enum import StrEnum


class ServiceClass(StrEnum):
    """Who waits for the answer. In the order of the priority bands, first served first."""

    INTERACTIVE = "interactive"  # a person reads along: time to first token and per token count
    DEADLINE = "deadline"  # a program needs the whole answer by a time
    BATCH = "batch"  # can wait, and is shed first


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of one request, relative seconds; None: none.

    Attributes:
        ttft_s: arrival to first token.
        tpot_s: mean gap between tokens after the first.
        deadline_s: arrival to last token.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None


NO_SLO = Slo()
