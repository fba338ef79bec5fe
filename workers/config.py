"""Configuration that both kinds of worker share."""

from pydantic import Field

from core.config import ConfigModel
from core.registration import RegistrationConfig
from core.tls import PeerTls
from engine.config import EngineConfig, ModelConfig
from grammar.config import GrammarConfig
from kv_transfer.config import KvTransferConfig


class TopologyConfig(ConfigModel):
    """Where a worker stands: what the way between two workers may be guessed from before it was measured."""

    rack: str = Field("", description="workers of one rack share its switch; empty: not known")
    zone: str = Field("", description="workers of one zone are close to each other; empty: not known")


class WorkerConfig(ConfigModel):
    """The model, how it runs, and how gateways and peers reach the worker."""

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    transfer: KvTransferConfig = KvTransferConfig()
    grammar: GrammarConfig = GrammarConfig()
    registration: RegistrationConfig = RegistrationConfig()
    topology: TopologyConfig = TopologyConfig()
    host: str = Field("127.0.0.1", description="address that the gRPC server binds to; gateways and peers reach it")
    port: int = Field(0, ge=0, le=65535, description="of the gRPC server; 0 takes a free one")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="of /metrics; 0 takes a free one; absent: not served"
    )
    tls: PeerTls | None = Field(
        None, description="between this worker, its gateways and its peers; absent: none, everybody can talk to it"
    )
    max_requests: int = Field(256, ge=1, description="requests accepted and not done with; more are refused")
    hello_timeout_s: float = Field(10.0, gt=0, description="a gateway's stream that says nothing for so long is ended")
    load_interval_s: float = Field(0.05, gt=0, description="load reports to a gateway are at least so far apart")
    load_heartbeat_s: float = Field(1.0, gt=0, description="and at most so far apart, even when nothing has changed")
    max_unread_reports: int = Field(16384, ge=16, description="to one gateway; one that leaves more unread is cut off")
