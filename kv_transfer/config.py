"""Configuration of KV transfer; part of both workers' configuration."""

from typing import Literal, Self

from pydantic import Field, model_validator

from core.config import ConfigModel
from kv_transfer.frame import HEADER_BYTES

MIB = 1024 * 1024


class KvTransferConfig(ConfigModel):
    """Limits and deadlines of one worker's side. Slot size and credit are the receiver's to decide."""

    backend: Literal["auto", "gloo", "nccl", "memory"] = Field(
        "auto",
        description="carrier of KV bytes; auto is gloo; memory joins a sender and a receiver of one process",
    )
    host: str = Field(
        "127.0.0.1",
        description="address of this worker that peers can reach: the rendezvous store and the links bind to it",
    )
    slot_bytes: int = Field(
        4 * MIB + HEADER_BYTES,
        ge=4 * HEADER_BYTES,
        le=256 * MIB,
        description="largest message on a link, header area included; a frame is cut to fit into it",
    )
    num_slots: int = Field(4, ge=2, le=64, description="staging slots per pair and side: frames outstanding on a link")
    credit_bytes: int = Field(
        64 * MIB, ge=4096, description="bytes a sender may have sent to this receiver that are not yet in its pool"
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
    open_timeout_s: float = Field(5.0, gt=0, description="link: both sides join the process group")
    send_timeout_s: float = Field(10.0, gt=0, description="one frame on the wire; longer means that the link is stuck")
    close_timeout_s: float = Field(5.0, gt=0, description="threads of a closing pair")

    @model_validator(mode="after")
    def _credit_holds_a_slot(self) -> Self:
        if self.credit_bytes < self.slot_bytes:
            raise ValueError("credit_bytes must be at least slot_bytes, or no frame could ever be sent")
        return self
