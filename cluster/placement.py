"""Who gets how much of the machine: CPUs and GPUs per worker, and the cores that it is pinned to. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.config import ClusterConfig
from core.errors import ConfigError
from core.ids import WorkerId
from core.membership import Role


@dataclass(frozen=True, slots=True)
class Demand:
    """What one pool asks for, per worker. `num_cpus` None is an equal share of the node's cores."""

    pool: str
    replicas: int
    num_cpus: float | None
    num_gpus: float


@dataclass(slots=True)
class CoreMap:
    """Cores of every node, and who is pinned to them."""

    _pinned: dict[WorkerId, tuple[str, frozenset[int]]] = field(default_factory=dict)

    def take(self, worker: WorkerId, node: str, cores: frozenset[int], num_cpus: float) -> frozenset[int]:
        """Return the cores to pin `worker` to: whole ones of its own, or none (not pinned) if there are too few.

        Pinning several workers to one core would leave others idle while a request is alone in the cluster, so workers
        that must share are left to the kernel. A restarted worker's former cores are free again.
        """
        self._pinned.pop(worker, None)
        wanted = math.floor(num_cpus)
        taken = frozenset[int]().union(*(theirs for where, theirs in self._pinned.values() if where == node))
        free = sorted(cores - taken)
        if wanted < 1 or wanted > len(free):
            return frozenset()
        mine = frozenset(free[:wanted])
        self._pinned[worker] = (node, mine)
        return mine


def demands(config: ClusterConfig) -> dict[str, Demand]:
    """Return what the pools ask for."""
    gpus = 1.0 if config.model.device.startswith("cuda") else 0.0
    return {
        role: Demand(
            pool=role,
            replicas=pool.replicas,
            num_cpus=pool.resources.num_cpus,
            num_gpus=gpus if pool.resources.num_gpus is None else pool.resources.num_gpus,
        )
        for role, pool in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode))
    }


def shares(demands: Mapping[str, Demand], *, cpus: float, gpus: float, where: str) -> dict[str, float]:
    """Return the CPUs per worker of each pool.

    Args:
        cpus, gpus: of the whole machine or Ray cluster that `where` names.

    Raises:
        ConfigError: explicit demands exceed what there is.
    """
    for kind, available, asked in (
        ("CPUs", cpus, {d.pool: d.replicas * (d.num_cpus or 0.0) for d in demands.values()}),
        ("GPUs", gpus, {d.pool: d.replicas * d.num_gpus for d in demands.values()}),
    ):
        total = sum(asked.values())
        if total > available:
            parts = ", ".join(f"{pool} {amount:g}" for pool, amount in asked.items() if amount)
            raise ConfigError(f"resources: not enough {kind}: asked for {total:g} ({parts}), {where} has {available:g}")
    sharing = sum(d.replicas for d in demands.values() if d.num_cpus is None)
    left = cpus - sum(d.replicas * (d.num_cpus or 0.0) for d in demands.values())
    share = max(0.0, left) / sharing if sharing else 0.0
    if share >= 1:
        share = float(math.floor(share))  # whole cores can be pinned
    else:
        share = math.floor(share * 1000) / 1000  # so that the sum never exceeds what there is
    return {name: share if d.num_cpus is None else d.num_cpus for name, d in demands.items()}
