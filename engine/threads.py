"""How many CPU threads a step is worth.

A step of a small model with few tokens consists of operators of some microseconds; waking and awaiting other threads
for each costs more than they save, and much more when another process wants the cores. The estimate is rough (bandwidth
and rates of one core, in orders of magnitude); it only has to tell microseconds from milliseconds.
"""

from dataclasses import dataclass

_BYTES_PER_S = 40e9  # one core reading weights
_FLOPS = {"float32": 200e9, "bfloat16": 400e9}  # one core multiplying
_REGIONS_PER_LAYER = 8  # operators that start and await the team
_REGION_S = 5e-6
_MIN_GAIN = 4.0  # parallel only when one thread would need this many times what the team's waiting costs


@dataclass(frozen=True, slots=True)
class StepCost:
    """Cost of a step on one thread.

    Attributes:
        num_weights: elements of the matrices that a token is multiplied with.
        weight_bytes: what a step reads.
        num_layers, dtype: of the model.
    """

    num_weights: int
    weight_bytes: int
    num_layers: int
    dtype: str

    def one_thread_s(self, num_tokens: int) -> float:
        """Return the estimated seconds. Pure."""
        return max(self.weight_bytes / _BYTES_PER_S, 2 * self.num_weights * num_tokens / _FLOPS[self.dtype])

    def threads(self, num_tokens: int, available: int) -> int:
        """Return 1 or `available`. Pure."""
        waiting_s = self.num_layers * _REGIONS_PER_LAYER * _REGION_S
        return available if self.one_thread_s(num_tokens) > _MIN_GAIN * waiting_s else 1
