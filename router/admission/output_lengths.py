"""How long answers become: quantiles of what was seen, given what is known about the request.

Histories form a hierarchy: of the tenant, class and asked length together; of the tenant and class; of the class and
asked length; of the class; of all. The narrowest one with enough samples that apply answers. Each keeps its latest
samples only and, when a new one comes, none that is too old. Which got none for longest makes room for a new history.

Asked about a request that has produced g tokens already, only samples longer than g apply: so the bound tightens as
tokens arrive. An answer that was cut at its asked length counts with that length; wider histories thus know a little
too little of long ones, which is why the asked length is part of the narrow ones.

Source: Gong et al., "Past-Future Scheduler", ASPLOS 2025 (history, conditioned on what was produced); JITServe, NSDI
2026 (a high quantile as bound, asked again as tokens arrive), here with the plain empirical quantile for its forest.
"""

from bisect import bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from core.service_class import ServiceClass
from router.admission.config import OutputLengthsConfig


@dataclass(frozen=True, slots=True)
class LengthKey:
    """What is known of a request when it comes."""

    tenant: str
    service_class: ServiceClass
    max_tokens: int


_HistoryKey = tuple[str | None, ServiceClass | None, int | None]


class _History:
    """The latest lengths, in order of time and of size."""

    __slots__ = ("latest", "ordered")

    def __init__(self) -> None:
        self.latest: deque[tuple[float, int]] = deque()
        self.ordered: list[int] = []

    def add(self, length: int, now: float) -> None:
        self.latest.append((now, length))
        insort(self.ordered, length)

    def drop_oldest(self) -> None:
        _, length = self.latest.popleft()
        del self.ordered[bisect_right(self.ordered, length) - 1]


class OutputLengths:
    """All histories of one gateway.

    Args:
        prior_tokens: expected while nothing is known.
    """

    def __init__(self, config: OutputLengthsConfig, prior_tokens: int) -> None:
        self._config = config
        self._prior_tokens = prior_tokens
        self._histories: OrderedDict[_HistoryKey, _History] = OrderedDict()

    def __len__(self) -> int:
        return len(self._histories)

    @property
    def num_samples(self) -> int:
        return sum(len(history.ordered) for history in self._histories.values())

    def record(self, key: LengthKey, num_tokens: int, now: float) -> None:
        """A request ended well after `num_tokens`."""
        for name in _widening(key):
            history = self._histories.get(name)
            if history is None:
                history = self._histories[name] = _History()
            self._histories.move_to_end(name)
            history.add(num_tokens, now)
            oldest = now - self._config.forget_after_s
            while len(history.latest) > self._config.window or history.latest[0][0] < oldest:
                history.drop_oldest()
        while len(self._histories) > self._config.max_histories:
            self._histories.popitem(last=False)

    def quantile(self, key: LengthKey, q: float, generated: int = 0) -> int:
        """Return the length that a part `q` of such requests does not exceed, in [generated + 1, max_tokens].

        With few samples that apply, the widest history that has any answers; with none, one that got so far is expected
        to produce as much again.

        Args:
            q: (0, 1].
            generated: tokens that the request has produced without an end.
        """
        return max(generated + 1, min(key.max_tokens, self._quantile(key, q, generated)))

    def _quantile(self, key: LengthKey, q: float, generated: int) -> int:
        widest: tuple[list[int], int] | None = None
        for name in _widening(key):
            history = self._histories.get(name)
            if history is None:
                continue
            first = bisect_right(history.ordered, generated)
            num_apply = len(history.ordered) - first
            if num_apply >= self._config.min_samples:
                return history.ordered[first + ceil(q * num_apply) - 1]
            if num_apply:
                widest = history.ordered, first
        if widest is None:
            return self._prior_tokens if generated == 0 else 2 * generated
        ordered, first = widest
        return ordered[first + ceil(q * (len(ordered) - first)) - 1]


def _widening(key: LengthKey) -> Iterator[_HistoryKey]:
    """Narrowest first; asked lengths are told apart by powers of two."""
    asked = key.max_tokens.bit_length()
    yield key.tenant, key.service_class, asked
    yield key.tenant, key.service_class, None
    yield None, key.service_class, asked
    yield None, key.service_class, None
    yield None, None, None
