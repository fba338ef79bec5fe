"""The order of those who wait: bands of urgency, tenants within a band, the requests of one tenant.

1. A band per service class, strictly one after the other. Each `aging_s` that a ticket has waited lifts it one band, so
   no class waits for another without end; in the first band all that is left to wait for is the fair share.
2. Within a band: first those who were released before and refused by the cluster, in the order of that release (they
   were charged then); after them whose tenant was served least (`router.admission.fairness`).
3. Within a tenant: by the time that the request is due at. An interactive one is due on arrival, one with a deadline at
   that, a batch request after `max_slack_s`, which also bounds the others; each level of priority is worth `aging_s`.
   So nobody is overtaken by a later one that arrived more than `max_slack_s` and the priorities' span after it.

A ticket that was refused keeps the lead of its band though smaller ones behind it might fit: that is how a large one
gathers its room. Pure; the caller owns the time.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from core.ids import RequestId
from core.service_class import ServiceClass
from router.admission.claims import RANK, Claim
from router.admission.fairness import FairShares


@dataclass(frozen=True, slots=True)
class Ticket:
    """A place in the queue.

    Attributes:
        number: of its entry.
        released_as: number of its first release; None: it was not released yet.
    """

    claim: Claim
    number: int
    cost: float
    released_as: int | None = None

    @property
    def request_id(self) -> RequestId:
        return self.claim.request_id


@dataclass(frozen=True, slots=True)
class Charge:
    """What a tenant was charged for a released request, in which band. `lift` is for `FairShares.correct`."""

    band: int
    tenant: str
    cost: float
    lift: int


@dataclass(slots=True)
class _Line:
    """Those of one tenant in one band, most urgent first."""

    tickets: list[tuple[float, int, RequestId]] = field(default_factory=list)
    num_tokens: int = 0


class _Band:
    def __init__(self, share_of: Callable[[str], float]) -> None:
        self.returned: list[tuple[int, RequestId]] = []
        self.lines: dict[str, _Line] = {}
        self.shares = FairShares(share_of)
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self.returned) + sum(len(line.tickets) for line in self.lines.values())


class Bands:
    """All who wait.

    Args:
        share_of: a tenant's share against others, > 0.
    """

    def __init__(self, *, aging_s: float, max_slack_s: float, share_of: Callable[[str], float]) -> None:
        self._aging_s = aging_s
        self._max_slack_s = max_slack_s
        self._share_of = share_of
        self._bands = [_Band(share_of) for _ in RANK]
        self._places: dict[RequestId, tuple[Ticket, int]] = {}  # with the band that it is in
        self._promotions: list[
            tuple[float, int, int, RequestId]
        ] = []  # (when, to band, ticket number, id), some outdated

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_tokens(self) -> int:
        return sum(band.num_tokens for band in self._bands)

    def add(self, ticket: Ticket, now: float) -> None:
        """It waits from now on, in the band that it has earned since it arrived."""
        waited_s = max(0.0, now - ticket.claim.arrived_at)
        band = max(0, RANK[ticket.claim.service_class] - int(waited_s / self._aging_s))
        self._put(ticket, band)

    def remove(self, request_id: RequestId) -> Ticket | None:
        """It waits no more. Returns its ticket if it did."""
        place = self._places.pop(request_id, None)
        if place is None:
            return None
        ticket, number = place
        band = self._bands[number]
        band.num_tokens -= ticket.claim.num_tokens
        if ticket.released_as is not None:
            del band.returned[bisect_left(band.returned, (ticket.released_as, request_id))]
            return ticket
        line = band.lines[ticket.claim.tenant]
        del line.tickets[bisect_left(line.tickets, self._key(ticket))]
        line.num_tokens -= ticket.claim.num_tokens
        if not line.tickets:
            del band.lines[ticket.claim.tenant]
            band.shares.leave(ticket.claim.tenant)
        return ticket

    def pop(self) -> tuple[Ticket, Charge | None]:
        """Release the one whose turn it is. Returns it, and what its tenant is charged unless it was before."""
        number = next(number for number, band in enumerate(self._bands) if band.returned or band.lines)
        band, charge = self._bands[number], None
        if band.returned:
            request_id = band.returned[0][1]
        else:
            tenant = band.shares.first()
            request_id = band.lines[tenant].tickets[0][2]
            cost = self._places[request_id][0].cost
            charge = Charge(number, tenant, cost, band.shares.serve(tenant, cost))
        ticket = self.remove(request_id)
        assert ticket is not None
        return ticket, charge

    def correct(self, charge: Charge, cost: float) -> None:
        """What was charged turned out to cost so much more (or less, negative)."""
        self._bands[charge.band].shares.correct(charge.tenant, cost, charge.lift)

    def age(self, now: float) -> None:
        """Lift those who have waited long enough."""
        while self._promotions and self._promotions[0][0] <= now:
            entry = heapq.heappop(self._promotions)
            if self._is_current(entry):
                ticket = self.remove(entry[3])
                assert ticket is not None
                self._put(ticket, entry[1])

    def tokens_before(self, service_class: ServiceClass, tenant: str, num_tokens: int) -> int:
        """Return how many waiting tokens a newcomer of so many would have before it, if nobody came after it.

        Of its own band these are the tenant's own, and of every other tenant as many as that is fair for.
        """
        rank = RANK[service_class]
        band = self._bands[rank]
        own_line = band.lines.get(tenant)
        own = own_line.num_tokens if own_line is not None else 0
        until = (own + num_tokens) / self._share_of(tenant)
        fair = sum(
            min(line.num_tokens, int(until * self._share_of(other)))
            for other, line in band.lines.items()
            if other != tenant
        )
        returned = sum(self._places[request_id][0].claim.num_tokens for _, request_id in band.returned)
        return sum(before.num_tokens for before in self._bands[:rank]) + returned + own + fair

    def last_first(self, newcomer: Claim) -> Iterator[Ticket]:
        """Yield those who can wait for `newcomer`, who can wait longest first. Changes nothing.

        All of later bands, then those of its own band whose tenant would still hold no less than the newcomer's. Always
        the end of the line that holds most for its tenant's share; who was released before, after all lines.
        """
        rank = RANK[newcomer.service_class]
        for number in range(len(self._bands) - 1, rank - 1, -1):
            band = self._bands[number]
            own = band.lines.get(newcomer.tenant)
            own_tokens = (own.num_tokens if own is not None else 0) + newcomer.num_tokens
            least = own_tokens / self._share_of(newcomer.tenant) if number == rank else 0.0
            yield from self._ends(band, least, newcomer.tenant if number == rank else None)
            if number > rank:
                yield from (self._places[request_id][0] for _, request_id in reversed(band.returned))

    def check(self) -> None:
        """Assert what must hold between calls."""
        assert sum(map(len, self._bands)) == len(self._places)
        for number, band in enumerate(self._bands):
            band.shares.check()
            assert len(band.shares) == len(band.lines)
            members = [ticket for ticket, at in self._places.values() if at == number]
            assert band.num_tokens == sum(ticket.claim.num_tokens for ticket in members)
            assert len(members) == len(band)

    def _ends(self, band: _Band, least: float, spared: str | None) -> Iterator[Ticket]:
        heap = [
            (-line.num_tokens / self._share_of(tenant), tenant, len(line.tickets) - 1, line.num_tokens)
            for tenant, line in band.lines.items()
            if tenant != spared
        ]
        heapq.heapify(heap)
        while heap:
            held_of_share, tenant, position, held = heapq.heappop(heap)
            if -held_of_share <= least:
                return  # nor does any other hold more
            ticket = self._places[band.lines[tenant].tickets[position][2]][0]
            rest = held - ticket.claim.num_tokens
            if rest / self._share_of(tenant) < least:
                continue
            yield ticket
            if position:
                heapq.heappush(heap, (-rest / self._share_of(tenant), tenant, position - 1, rest))

    def _put(self, ticket: Ticket, number: int) -> None:
        band, claim = self._bands[number], ticket.claim
        self._places[ticket.request_id] = (ticket, number)
        band.num_tokens += claim.num_tokens
        if ticket.released_as is not None:
            insort(band.returned, (ticket.released_as, ticket.request_id))
        else:
            line = band.lines.setdefault(claim.tenant, _Line())
            insort(line.tickets, self._key(ticket))
            line.num_tokens += claim.num_tokens
            band.shares.join(claim.tenant)
        if number > 0:
            earned = RANK[claim.service_class] - number + 1
            when = claim.arrived_at + earned * self._aging_s
            heapq.heappush(self._promotions, (when, number - 1, ticket.number, ticket.request_id))
            if len(self._promotions) > 2 * len(self._places) + 64:
                self._promotions = list(filter(self._is_current, self._promotions))
                heapq.heapify(self._promotions)

    def _is_current(self, promotion: tuple[float, int, int, RequestId]) -> bool:
        _, to_band, number, request_id = promotion
        place = self._places.get(request_id)
        return place is not None and place[0].number == number and place[1] == to_band + 1

    def _key(self, ticket: Ticket) -> tuple[float, int, RequestId]:
        claim = ticket.claim
        match claim.service_class:
            case ServiceClass.INTERACTIVE:
                slack_s = 0.0
            case ServiceClass.DEADLINE if claim.deadline_s is not None:
                slack_s = min(claim.deadline_s, self._max_slack_s)
            case _:
                slack_s = self._max_slack_s
        return (claim.arrived_at + slack_s - claim.priority * self._aging_s, ticket.number, ticket.request_id)
