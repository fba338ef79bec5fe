"""One round of questions: who refused a request, or was lost to it, since its turn came. Pure.

A worker that refused is not asked again in the round, but for one that only said that it is busier than was thought:
what it told of its load is known now, and it may be the best one still. After enough such answers of a role the next
question to it takes none.
"""

from core.errors import RejectedError, RejectReason
from core.ids import WorkerId
from core.membership import Role

_MAX_BUSIER = 2  # of one role in a round


class Round:
    """Of one request.

    Attributes:
        retry_after_s: the longest hint of those who refused.
    """

    def __init__(self) -> None:
        self.retry_after_s = 0.0
        self._refusals: dict[WorkerId, RejectReason | None] = {}  # None: lost
        self._num_busier = dict.fromkeys(Role, 0)

    @property
    def refused(self) -> frozenset[WorkerId]:
        """Who is not to be asked."""
        return frozenset(self._refusals)

    @property
    def is_too_long(self) -> bool:
        """Everybody who was asked said that the request can never fit."""
        return bool(self._refusals) and all(why is RejectReason.TOO_LONG for why in self._refusals.values())

    def is_conditional(self, role: Role) -> bool:
        """The next worker of the role may say that it is busier than was thought."""
        return self._num_busier[role] < _MAX_BUSIER

    def refuse(self, worker_id: WorkerId, role: Role, error: RejectedError) -> None:
        """The worker said no."""
        if error.reason is RejectReason.BUSIER and self.is_conditional(role):
            self._num_busier[role] += 1
            return
        self._refusals[worker_id] = error.reason
        self.retry_after_s = max(self.retry_after_s, error.retry_after_s)

    def lose(self, worker_id: WorkerId) -> None:
        """The worker was lost."""
        self._refusals[worker_id] = None

    def ask_afresh(self, role: Role) -> None:
        """Ask all workers of `role` again but those that were lost."""
        self._refusals = {worker: None for worker, why in self._refusals.items() if why is None}
        self._num_busier[role] = 0
