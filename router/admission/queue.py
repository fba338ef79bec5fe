"""The gateway's waiting room: who may stay in it, in what order the cluster is asked, and how fast it empties.

A ticket counts from `enter` until the workers that the request needs now accepted it (or it ended), so the bounds hold
for everything that the cluster has not taken yet. Life of a ticket:
1. `enter`: WAITING. When there is no room, those who can wait longer are shed for it, or it is refused.
2. `take`: RELEASED, in the order of `router.admission.bands`, as many as `router.admission.gate` lets through. The
   tenant is charged by the expected length.
3. They accepted: `leave`. Refused by everybody: `put_back`, WAITING again at the head of its band. The same
   happens to one that had left and lost its workers, full or not.
4. The request is over, however and whenever: `end`; the charge is corrected.

Pure but for the given generator; the caller owns the time, which must not run backwards.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from core.errors import RejectedError, RejectReason
from core.ids import RequestId
from core.service_class import ServiceClass
from router.admission.bands import Bands, Charge, Ticket
from router.admission.claims import Amount, Claim
from router.admission.gate import Gate
from router.admission.room import Room
from router.admission.speed import QueueSpeed
from router.config import RouterConfig

_RETRY_HINT_S = 1.0  # while the queue's speed is not known


@dataclass(frozen=True, slots=True)
class QueueRules:
    """What the queue goes by.

    Attributes:
        reserved_ratio: part of each bound that is kept for each class.
        output_token_weight: of a generated token, against 1 of a prompt token.
        shares, default_share: of the tenants that are named, and of all others, > 0.
    """

    bounds: Amount
    reserved_ratio: float
    aging_s: float
    max_slack_s: float
    output_token_weight: float
    rate_window_s: float
    max_retry_after_s: float
    retry_min_s: float
    retry_max_s: float
    shares: Mapping[str, float]
    default_share: float


def queue_rules(config: RouterConfig) -> QueueRules:
    """Pure."""
    admission = config.admission
    return QueueRules(
        bounds=Amount(config.max_queued_requests, config.max_queued_tokens, config.max_queued_bytes),
        reserved_ratio=admission.reserved_ratio,
        aging_s=admission.aging_s,
        max_slack_s=admission.max_slack_s,
        output_token_weight=admission.output_token_weight,
        rate_window_s=admission.rate_window_s,
        max_retry_after_s=admission.max_retry_after_s,
        retry_min_s=config.retry_min_s,
        retry_max_s=config.retry_max_s,
        shares={name: tenant.weight for name, tenant in config.tenants.items()},
        default_share=config.default_tenant.weight,
    )


@dataclass(frozen=True, slots=True)
class Shed:
    """A request that was sent away after it had entered, and why."""

    request_id: RequestId
    error: RejectedError


@dataclass(slots=True)
class _Release:
    """Of a request that is not over. `number`: in the order of first releases."""

    number: int
    claim: Claim
    charge: Charge
    is_accepted: bool = False


class AdmissionQueue:
    """The queue."""

    def __init__(self, rules: QueueRules, rng: random.Random) -> None:
        self._rules = rules
        self._bands = Bands(
            aging_s=rules.aging_s,
            max_slack_s=rules.max_slack_s,
            share_of=lambda tenant: rules.shares.get(tenant, rules.default_share),
        )
        self._gate = Gate(retry_min_s=rules.retry_min_s, retry_max_s=rules.retry_max_s, rng=rng)
        self._room = Room(rules.bounds, rules.reserved_ratio)
        self._speed = QueueSpeed(rules.rate_window_s)
        self._tickets: dict[RequestId, Ticket] = {}
        self._releases: dict[RequestId, _Release] = {}
        self._num_entered = 0
        self._num_released = 0

    def __len__(self) -> int:
        """Requests that no workers have accepted yet."""
        return len(self._tickets)

    @property
    def num_waiting(self) -> int:
        return len(self._bands)

    @property
    def num_tokens(self) -> int:
        return self._room.held.num_tokens

    @property
    def num_bytes(self) -> int:
        return self._room.held.num_bytes

    def queued_by_class(self) -> dict[ServiceClass, int]:
        return {service_class: self._room.held_by(service_class).num_requests for service_class in ServiceClass}

    def check_room(self, claim: Claim) -> None:
        """Changes nothing.

        Raises:
            RejectedError: QUEUE_FULL, and nobody in it can wait for `claim`.
        """
        self._victims(claim)

    def enter(self, claim: Claim, now: float) -> list[Shed]:
        """Take a place. Returns who lost theirs for it; the caller ends those requests.

        Raises:
            RejectedError: as `check_room`; nothing changed.
        """
        victims = self._victims(claim)
        self._pass_time(now)
        for ticket in victims:
            self._bands.remove(ticket.request_id)
            self._forget(ticket.request_id)
        self._bands.add(self._admit(claim), now)
        detail = f"a request of class {claim.service_class} needs the place in the gateway's queue"
        return [
            Shed(ticket.request_id, RejectedError(RejectReason.SHED, detail, self._retry_after_s(ticket.claim)))
            for ticket in victims
        ]

    def take(self, now: float) -> list[RequestId]:
        """Release those whose turn it is, in order."""
        self._pass_time(now)
        self._bands.age(now)
        released = []
        for _ in range(self._gate.places(len(self._bands), now)):
            ticket, charge = self._bands.pop()
            released.append(ticket.request_id)
            if charge is not None:
                self._releases[ticket.request_id] = _Release(self._num_released, ticket.claim, charge)
                self._num_released += 1
        self._gate.released(released)
        return released

    def put_back(self, claim: Claim, now: float, retry_after_s: float = 0.0) -> None:
        """Everybody refused it. Also takes back one that had left (it lost its workers), full or not."""
        self._pass_time(now)
        release = self._releases[claim.request_id]
        release.is_accepted = False
        ticket = self._tickets.get(claim.request_id) or self._admit(claim)
        ticket = self._tickets[claim.request_id] = replace(ticket, released_as=release.number)
        self._bands.add(ticket, now)
        self._gate.refused(claim.request_id, now, retry_after_s)

    def leave(self, request_id: RequestId, now: float) -> None:
        """All workers that it needs accepted it. Idempotent."""
        self._pass_time(now)
        ticket = self._tickets.get(request_id)
        if ticket is not None and self._gate.is_limited and self._gate.is_asking(request_id):
            self._speed.accepted(ticket.claim.num_tokens, now)
        release = self._releases.get(request_id)
        if release is not None:
            release.is_accepted = True
        self._forget(request_id)
        self._gate.accepted(request_id, is_queue_empty=not self._tickets)

    def end(self, request_id: RequestId, now: float, output_tokens: int) -> None:
        """The request is over, after so many tokens. Idempotent."""
        self._pass_time(now)
        self._bands.remove(request_id)
        self._forget(request_id)
        self._gate.ended(request_id)
        release = self._releases.pop(request_id, None)
        if release is not None:
            surplus = self._rules.output_token_weight * (output_tokens - release.claim.expected_output_tokens)
            self._bands.correct(release.charge, surplus if release.is_accepted else -release.charge.cost)

    def note_capacity(self, now: float) -> None:
        """Something was freed, or a worker joined: the next question may go as early as the shortest wait allows."""
        self._gate.note_capacity(now)

    def next_deadline(self) -> float | None:
        """When `take` has something to release that it has not now; None when nothing waits on time."""
        return self._gate.opens_at if len(self._bands) else None

    def expected_wait_s(self, claim: Claim, now: float) -> float:
        """Predict how long `claim` would wait here if it entered now, from how fast the queue empties.

        Who comes later and goes before it is not foreseen.
        """
        if not self._gate.is_limited:
            return 0.0
        before = self._bands.tokens_before(claim.service_class, claim.tenant, claim.num_tokens)
        released = self.num_tokens - self._bands.num_tokens
        emptied_s = self._speed.wait_s(before + released)
        return max(self._gate.closed_for(now), emptied_s or 0.0)

    def check(self) -> None:
        """Assert what must hold between calls."""
        self._bands.check()
        assert self._room.held.num_requests == len(self._tickets)
        assert self._room.held.num_tokens == sum(ticket.claim.num_tokens for ticket in self._tickets.values())
        assert self.num_waiting <= len(self._tickets)

    def _victims(self, claim: Claim) -> list[Ticket]:
        """Return who must go so that `claim` fits; nobody when there is room."""
        lack = self._room.lack(claim.service_class, claim.amount)
        if not lack:
            return []
        room, victims = self._room.copy(), []
        for ticket in self._bands.last_first(claim):
            victim = ticket.claim
            if not room.gives_way(victim.service_class):
                continue
            room.remove(victim.service_class, victim.amount)
            victims.append(ticket)
            if not room.lack(claim.service_class, claim.amount):
                return victims
        detail = f"the gateway's queue of {lack} is full"
        raise RejectedError(RejectReason.QUEUE_FULL, detail, self._retry_after_s(claim))

    def _admit(self, claim: Claim) -> Ticket:
        cost = claim.num_tokens + self._rules.output_token_weight * claim.expected_output_tokens
        ticket = self._tickets[claim.request_id] = Ticket(claim, self._num_entered, cost)
        self._num_entered += 1
        self._room.add(claim.service_class, claim.amount)
        return ticket

    def _forget(self, request_id: RequestId) -> None:
        ticket = self._tickets.pop(request_id, None)
        if ticket is not None:
            self._room.remove(ticket.claim.service_class, ticket.claim.amount)

    def _pass_time(self, now: float) -> None:
        self._speed.pass_time(now, is_backlogged=self._gate.is_limited)

    def _retry_after_s(self, claim: Claim) -> float:
        """How long it takes until as much as `claim` has left the queue, at its latest speed."""
        mean_tokens = self.num_tokens / max(1, len(self._tickets))
        wait_s = self._speed.wait_s(int(max(claim.num_tokens, mean_tokens)))
        hint_s = _RETRY_HINT_S if wait_s is None else max(self._rules.retry_max_s, wait_s)
        return min(hint_s, self._rules.max_retry_after_s)
