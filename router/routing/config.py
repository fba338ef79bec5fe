"""Configuration of the routing policy: weights, priors of the models, bounds."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from core.config import ConfigModel
from router.routing.modes import Mode

PolicyName = Literal["cost", "random", "round_robin", "least_loaded", "cache_aware_local"]


class Term(StrEnum):
    """What can be left out of the cost, to measure what it is worth."""

    QUEUE = "queue"
    PREFILL = "prefill"
    CROWDING = "crowding"  # what computing a prompt takes from those who come behind it
    TRANSFER = "transfer"
    DECODE = "decode"
    HOT = "hot"  # the discount on missing a prefix that everybody uses
    FORECAST = "forecast"  # decode load as it will be when the prefill ends
    CREDIT = "credit"  # what was sent since the last report


class ModelPriors(ConfigModel):
    """What a machine is taken to do until it has been seen to work. Every observation weakens them."""

    prefill_base_s: float = Field(0.01, gt=0)
    prefill_per_token_s: float = Field(2e-4, gt=0)
    prefill_per_token2_s: float = Field(2e-9, gt=0, description="per token computed and token attended to")
    decode_base_s: float = Field(0.01, gt=0, description="decode step of an empty batch")
    decode_per_request_s: float = Field(5e-4, gt=0)
    decode_per_context_token_s: float = Field(2e-7, gt=0)
    weight: float = Field(4.0, gt=0, description="of the prior, in observations")
    half_life: float = Field(64.0, ge=1, description="observations after which an old one counts half")


class LinkPriors(ConfigModel):
    """What a link is taken to do until KV has crossed it, by how near its ends are."""

    same_host_bytes_per_s: float = Field(4e9, gt=0)
    same_rack_bytes_per_s: float = Field(2e9, gt=0)
    same_zone_bytes_per_s: float = Field(1e9, gt=0)
    far_bytes_per_s: float = Field(2.5e8, gt=0)
    same_host_rtt_s: float = Field(2e-4, ge=0)
    same_rack_rtt_s: float = Field(5e-4, ge=0)
    same_zone_rtt_s: float = Field(1e-3, ge=0)
    far_rtt_s: float = Field(1e-2, ge=0)
    tail_ratio: float = Field(0.1, ge=0, le=1, description="part of a transfer that follows the end of the prefill")
    forget_s: float = Field(60.0, gt=0, description="time constant with which an unused link fades into its class")
    max_learned: int = Field(16_384, ge=64, description="pairs whose link is known by itself; others go by class")


class RoutingConfig(ConfigModel):
    """How workers are chosen for a request."""

    policy: PolicyName = "cost"
    modes: tuple[Mode, ...] = Field(tuple(Mode), min_length=1, description="ways to serve a request that may be taken")
    late_binding: bool = Field(
        True, description="start a prefill while no decode worker has room, and choose that one meanwhile"
    )
    late_patience_s: float = Field(1.0, ge=0, description="how long after the prefill room may come for that")
    temperature: float = Field(
        0.0, ge=0, description="softmax over candidates, cost range as unit; 0 takes the cheapest"
    )
    candidates_per_role: int = Field(64, ge=1, description="cheapest workers of each role that are paired")
    candidates_kept: int = Field(8, ge=2, le=64, description="best placements that are drawn from and explained")
    priors: ModelPriors = ModelPriors()
    links: LinkPriors = LinkPriors()
    expected_output_tokens: int = Field(
        256, ge=1, description="length of an answer while no history tells, at most what was asked for"
    )
    crowding_weight: float = Field(
        8.0, ge=0, description="of what computing a prompt takes from those behind it, per prompt that a worker has"
    )
    local_prefill_max_tokens: int = Field(2048, ge=1, description="rest of a prompt that a decode worker may compute")
    local_prefill_min_held_ratio: float = Field(0.5, ge=0, le=1, description="of the prompt that it must hold for that")
    stall_weight: float = Field(0.25, ge=0, description="of the time for which a prompt stops each running request")
    colocated_slowdown: float = Field(2.0, ge=1, description="of decoding between the prompts of a prefill worker")
    colocation_handicap_ratio: float = Field(
        0.25, ge=0, description="by which one worker alone must be cheaper while both pools are there"
    )
    host_tier_bytes_per_s: float = Field(1e10, gt=0, description="from a worker's host memory to its device")
    slo_weight: float = Field(4.0, ge=0, description="cost of a second beyond a target, in seconds")
    affinity_credit_s: float = Field(0.005, ge=0, description="what staying with the workers of a session is worth")
    submit_slack_s: float = Field(
        0.02, ge=0, description="how much busier a worker may be than thought before it should send the request back"
    )
    stale_after_s: float = Field(3.0, gt=0, description="a worker not heard of for so long is asked last")
    forecast_bucket_s: float = Field(0.5, gt=0, description="resolution of the decode forecast")
    ignored_terms: frozenset[Term] = Field(frozenset(), description="left out of the cost: for measurements")
    explained_bytes: int = Field(8 * 2**20, ge=4096, description="of decisions kept with their candidates")
    prefix_index_bytes: int = Field(256 * 2**20, ge=2**20, description="cap of the whole prefix index of this process")
