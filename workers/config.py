"""Configuration that both kinds of worker share."""

from pydantic import Field

from core.config import ConfigModel
from core.registration import RegistrationConfig
from engine.config import EngineConfig, ModelConfig
from kv_transfer.config import KvTransferConfig


class WorkerConfig(ConfigModel):
    """The model, how it runs, and how gateways and peers reach the worker."""

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    transfer: KvTransferConfig = KvTransferConfig()
    registration: RegistrationConfig = RegistrationConfig()
    host: str = Field("127.0.0.1", description="address that the gRPC server binds to; gateways and peers reach it")
    port: int = Field(0, ge=0, le=65535, description="of the gRPC server; 0 takes a free one")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="of /metrics; 0 takes a free one; absent: not served"
    )
    max_requests: int = Field(256, ge=1, description="requests accepted and not done with; more are refused")
    hello_timeout_s: float = Field(10.0, gt=0, description="a gateway's stream that says nothing for so long is ended")
    load_interval_s: float = Field(0.05, gt=0, description="load reports to a gateway are at least so far apart")
    max_unread_reports: int = Field(16384, ge=16, description="to one gateway; one that leaves more unread is cut off")
