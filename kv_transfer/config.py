"""Configuration of KV transfer; part of both workers' configuration."""

import os
from typing import Literal, Self

from pydantic import Field, model_validator

from core.config import ConfigModel
from core.kv_quality import KvQuality
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.frame import HEADER_BYTES

MIB = 1024 * 1024
MIN_SLOT_BYTES, MAX_SLOT_BYTES = 4 * HEADER_BYTES, 256 * MIB


def _default_codec_threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))


class KvTransferConfig(ConfigModel):
    """Limits and deadlines of one worker's side. Slot size and credit are the receiver's to decide."""

    backend: Literal["auto", "shm", "tcp", "gloo", "nccl", "memory"] = Field(
        "auto",
        description="carrier of KV bytes; auto is shared memory between processes of one host, tcp between hosts; "
        "memory joins a sender and a receiver of one process",
    )
    host: str = Field(
        "127.0.0.1",
        description="address of this worker that peers can reach: the rendezvous store and the links bind to it",
    )
    slot_bytes: int = Field(
        4 * MIB + HEADER_BYTES,
        ge=MIN_SLOT_BYTES,
        le=MAX_SLOT_BYTES,
        description="largest message on a link, header area included; a frame is cut to fit into it",
    )
    num_slots: int = Field(4, ge=2, le=64, description="staging slots per pair and side: frames outstanding on a link")
    credit_bytes: int = Field(
        64 * MIB, ge=4096, description="bytes a sender may have sent to this receiver that are not yet in its pool"
    )
    codec_threads: int = Field(
        default_factory=_default_codec_threads,
        ge=1,
        le=64,
        description="threads that encode, or decode, frames of this worker's coded transfers",
    )
    frames_per_transfer: int = Field(
        6,
        ge=1,
        le=256,
        description="a coded transfer is cut into about this many frames, so that coding and sending overlap",
    )
    min_frame_raw_bytes: int = Field(
        256 * 1024, ge=4096, description="a coded frame is not cut smaller than this many bytes of KV"
    )
    max_frame_raw_bytes: int = Field(
        16 * MIB, ge=4096, description="a coded frame holds at most this many bytes of KV, and fits into a slot coded"
    )
    lookahead_bytes: int = Field(
        64 * MIB,
        ge=4096,
        description="bytes of KV per link and side that are being encoded ahead of the wire, or decoded behind it",
    )
    codec_timeout_s: float = Field(
        30.0, gt=0, description="coding one frame, waiting for a codec thread included; longer means that it is stuck"
    )
    rate_limit_bytes_per_s: float | None = Field(
        None, gt=0, description="each link sends no faster than this; for tests and for polite background traffic"
    )
    max_links: int = Field(
        64, ge=1, description="links that a sender keeps open; the least recently used idle one makes room for another"
    )
    max_strays: int = Field(
        256, ge=1, description="offers that a receiver lets wait for their reservation; one past it is refused"
    )
    lease_s: float = Field(
        30.0,
        gt=0,
        description="life of a transfer that nobody hears of, for a reservation that names none; the gateway's always "
        "do (its reservation_lease_s); renewed by heartbeats",
    )
    offer_timeout_s: float = Field(10.0, gt=0, description="from an offer to its reservation, and for strays")
    connect_timeout_s: float = Field(5.0, gt=0, description="control stream: connection and hello, on either side")
    open_timeout_s: float = Field(5.0, gt=0, description="link: both ends meet")
    send_timeout_s: float = Field(10.0, gt=0, description="one frame on the wire; longer means that the link is stuck")
    close_timeout_s: float = Field(5.0, gt=0, description="threads of a closing pair")

    profiles: str = Field(
        "auto",
        min_length=1,
        description="library of compression profiles: auto (kv_profiles.yaml next to the checkpoint, if it is there), "
        "none, or a path",
    )
    policy: str = Field(
        "controller",
        min_length=1,
        description="controller chooses a profile per transfer; or the name of the one profile to use where the "
        "request's quality allows it",
    )
    quality: KvQuality = Field(
        "exact",
        description="what the gateway takes for requests that ask for none: the least token agreement of their "
        "profile (a lower confidence bound); exact means lossless, high 0.99, balanced 0.97",
    )
    controller: ControllerConfig = Field(default=ControllerConfig(), description="how a profile is chosen")

    @model_validator(mode="after")
    def _credit_holds_a_slot(self) -> Self:
        if self.credit_bytes < self.slot_bytes:
            raise ValueError("credit_bytes must be at least slot_bytes, or no frame could ever be sent")
        return self
