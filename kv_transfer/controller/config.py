"""Configuration of the controller; part of `KvTransferConfig`."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from core.config import ConfigModel

PRIOR_GOODPUT_BYTES_PER_S = {"shm": 4e9, "memory": 4e9, "nccl": 1e10, "gloo": 1e9, "tcp": 1e9}


class ControllerConfig(ConfigModel):
    """How a profile is chosen per transfer. The defaults were tuned on the replay of `benchmarks/kv_controller.py`."""

    prior_goodput_bytes_per_s: Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        default=PRIOR_GOODPUT_BYTES_PER_S,
        description="per carrier: payload bytes per second that are assumed of a link on which nothing was measured",
    )
    prior_rtt_s: float = Field(0.0005, ge=0, description="round trip that is assumed while none was measured")
    hysteresis_ratio: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="the last profile is kept until what others would have saved adds up to this part of the exposed "
        "time; and of those that hide behind the prefill within this much, the least lossy is taken",
    )
    quality_margin_ratio: float = Field(
        0.01, ge=0, lt=1, description="a less lossy profile is taken even if it is slower by this much"
    )
    exploration: float = Field(
        0.5,
        ge=0,
        le=2,
        description="how many standard deviations of doubt count as one when profiles are tried; 0: never",
    )
    max_exploration_ratio: float = Field(
        1.5, ge=1, description="a profile is tried only if it is expected to take at most this many times the best"
    )
    crowding: float = Field(
        1.0,
        ge=0,
        le=10,
        description="weight of the delay that a transfer causes to those that will queue behind it",
    )
    knowledge_s: float = Field(900.0, gt=0, description="time constant with which experience loses its weight")
    cooldown_misses: int = Field(
        3, ge=1, le=10, description="of a profile's last 10 transfers: budget missed or failed"
    )
    cooldown_s: float = Field(30.0, ge=0, description="how long a profile then is not used on that kind of link")
    max_contexts: int = Field(4096, ge=16, description="pieces of experience kept; the least recently used go first")
    context_ttl_s: float = Field(3600.0, gt=0, description="experience without news for so long is forgotten")
    max_decisions: int = Field(512, ge=1, le=100_000, description="decisions kept for the admin call")
    save_interval_s: float = Field(30.0, gt=0, description="how often experience is saved to the store, if it changed")
