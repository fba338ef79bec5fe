"""The whole cluster in one YAML: composed of the packages' own configurations. The defaults run on a laptop."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.settings import complete, rooted, section
from cluster.supervision.backoff import BackOffConfig
from core.config import ConfigModel, load_config
from core.tls import ClientTls, PeerTls, ServerTls
from decode_workers.config import DecodeWorkerConfig
from engine.config import EngineConfig, ModelConfig
from kv_transfer.config import KvTransferConfig
from prefill_workers.config import PrefillWorkerConfig
from router.access.config import AccessConfig
from router.config import RouterConfig
from router.http.config import HttpConfig

_MAX_PORT = 65_535


class ResourcesConfig(ConfigModel):
    """What each worker of a pool reserves on its node."""

    num_cpus: float | None = Field(
        None, gt=0, le=1024, description="CPU cores, pinned when whole; default: an equal share, not pinned"
    )
    num_gpus: float | None = Field(
        None, ge=0, le=16, description="default: 1 on cuda, 0 on cpu; a fraction lets workers share a GPU"
    )
    custom: dict[str, float] = Field(default_factory=dict, description="custom Ray resources, such as node labels")
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Ray placement of the pool's workers over the nodes"
    )


class PoolConfig(ConfigModel):
    """One pool of workers: how many, where, and every setting of its worker."""

    replicas: int = Field(1, ge=1, le=1024)
    resources: ResourcesConfig = ResourcesConfig()


class GatewayConfig(ConfigModel):
    """The gateways: how many, where they listen, how they admit and route."""

    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="gateway processes, all alike; each listens one port above the one before, or with `share_port` "
        "all on the same",
    )


if TYPE_CHECKING:  # the real classes are made below, of fields that no static checker can see but these

    class PrefillPool(PoolConfig):
        engine: EngineConfig = EngineConfig()

    class DecodePool(PoolConfig):
        engine: EngineConfig = EngineConfig()

    class RouterSection(GatewayConfig):
        metrics_port: int | None = None
        access: AccessConfig = AccessConfig()
        http: HttpConfig = HttpConfig()
        tls: ServerTls | None = None

else:
    _FILLED = {"model", "transfer", "host", "port", "tls"}
    PrefillPool = section("PrefillPool", __name__, PoolConfig, PrefillWorkerConfig, filled=_FILLED)
    DecodePool = section("DecodePool", __name__, PoolConfig, DecodeWorkerConfig, filled=_FILLED)
    _SAID_ELSEWHERE = {"model_path", "served_model_name", "max_model_len", "kv_quality", "tls", "worker_tls"}
    RouterSection = section("RouterSection", __name__, GatewayConfig, RouterConfig, filled=_SAID_ELSEWHERE)


class RedisConfig(ConfigModel):
    """The shared store."""

    url: str | None = Field(
        None,
        pattern=r"^(redis|rediss|unix)://",
        description="a Redis 6.2+ or Valkey of yours; absent: one is embedded, on a private port of 127.0.0.1",
    )
    tls: ClientTls | None = Field(None, description="of a rediss:// URL; absent: what the system trusts")
    deadline_s: float = Field(1.0, gt=0, le=60, description="of every call")
    embedded_max_memory_bytes: int = Field(256 * 2**20, ge=8 * 2**20)


class TlsConfig(ConfigModel):
    """Certificates. What is encrypted with them, and what is not, is in docs/security.md."""

    public: ServerTls | None = Field(None, description="of the gateways' doors, HTTP and gRPC; absent: no TLS there")
    client: ClientTls = Field(ClientTls(), description="how `tandem` on this machine reaches those doors")
    internal: PeerTls | None = Field(
        None, description="between gateways and workers, and among workers; absent: no TLS there"
    )


class RayConfig(ConfigModel):
    """Where the processes run."""

    address: str | None = Field(
        None, description="host:port of an existing Ray cluster's GCS, or auto; absent: a private one on this machine"
    )
    object_store_bytes: int = Field(
        80 * 2**20, ge=75 * 2**20, description="of the private cluster; nothing of ours uses it"
    )
    ship_code: bool = Field(
        True, description="send our packages to the nodes of an existing cluster; false: they have them installed"
    )
    connect_timeout_s: float = Field(60.0, gt=0)
    place_timeout_s: float = Field(30.0, gt=0, description="for every worker to find a node")

    @field_validator("address")
    @classmethod
    def _no_ray_client(cls, address: str | None) -> str | None:
        if address is None or address == "auto":
            return address
        host, _, port = address.rpartition(":")
        if "/" in address or not host or not port.isdigit():
            raise ValueError("must be host:port of the GCS, or auto (a ray:// client cannot host the launcher)")
        return address


class SupervisionConfig(ConfigModel):
    """Deadlines of starting and stopping, and patience with failures."""

    worker_start_deadline_s: float = Field(600.0, gt=0, description="process, weights, KV pool, first registration")
    gateway_start_deadline_s: float = Field(
        180.0, gt=0, description="with the router's loops compiled, which takes a while once per machine"
    )
    redis_start_deadline_s: float = Field(10.0, gt=0)
    drain_deadline_s: float = Field(10.0, ge=0, description="for running requests to finish when the cluster stops")
    back_off: BackOffConfig = BackOffConfig()


class ClusterConfig(ConfigModel):
    """One Tandem cluster."""

    name: str = Field("tandem", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    model: ModelConfig
    prefill: PrefillPool = PrefillPool()
    decode: DecodePool = DecodePool()
    router: RouterSection = RouterSection()
    transfer: KvTransferConfig = KvTransferConfig()
    tls: TlsConfig = TlsConfig()
    redis: RedisConfig = RedisConfig()
    ray: RayConfig = RayConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    log_folder: Path | None = Field(
        None, description="one log file per service is kept here; absent: they go with the cluster's temporary folder"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="after")
    def _whole_is_consistent(self) -> Self:
        for name, build in (("prefill", self.prefill_worker), ("decode", self.decode_worker), ("router", self.gateway)):
            try:
                build()
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg']}") from error
        gateway, replicas = self.gateway(), self.router.replicas
        http_port = gateway.http_port if gateway.http.enabled else 0
        doors = self.num_gateway_ports
        for key, first, count in (
            ("port", gateway.port, doors),
            ("http.port", http_port, doors),
            ("metrics_port", gateway.metrics_port or 0, replicas),
        ):
            if first + count > _MAX_PORT + 1:
                raise ValueError(f"router.replicas: there are no {count} ports from router.{key} on")
        return self

    @property
    def num_gateway_ports(self) -> int:
        """Ports of one kind, gRPC or HTTP, that the gateways have together."""
        return 1 if self.gateway().share_port else self.router.replicas

    def prefill_worker(self, **filled: object) -> PrefillWorkerConfig:
        """Return the configuration of one prefill worker; `filled` are the fields that the launcher chose."""
        return complete(PrefillWorkerConfig, self.prefill, **self._of_workers, **filled)

    def decode_worker(self, **filled: object) -> DecodeWorkerConfig:
        """Return the configuration of one decode worker; `filled` are the fields that the launcher chose."""
        return complete(DecodeWorkerConfig, self.decode, **self._of_workers, **filled)

    @property
    def _of_workers(self) -> dict[str, object]:
        return {"model": self.model, "transfer": self.transfer, "tls": self.tls.internal}

    def gateway(self, index: int = 0, **filled: object) -> RouterConfig:
        """Return the configuration of one gateway; `filled` are the fields that the launcher chose."""
        metrics_port = self.router.metrics_port
        said = {
            "model_path": self.model.path,
            "served_model_name": self.model.name,
            "max_model_len": self.model.max_model_len,
            "kv_quality": self.transfer.quality,
            "tls": self.tls.public,
            "worker_tls": self.tls.internal,
            "metrics_port": metrics_port + index if metrics_port else metrics_port,
        }
        return complete(RouterConfig, self.router, **(said | filled))


def load_cluster_config(path: Path) -> ClusterConfig:
    """Read the YAML. Relative paths in it are relative to its folder.

    Raises:
        ConfigError: naming the file, the dotted path and the problem.
    """
    return _rooted(load_config(ClusterConfig, path), path.resolve().parent)


def _rooted(config: ClusterConfig, folder: Path) -> ClusterConfig:
    model = config.model.model_copy(update={"path": folder / config.model.path.expanduser()})
    logs = None if config.log_folder is None else folder / config.log_folder.expanduser()
    transfer = config.transfer
    if transfer.profiles not in ("auto", "none"):
        library = folder / Path(transfer.profiles).expanduser()
        transfer = transfer.model_copy(update={"profiles": str(library)})
    return config.model_copy(
        update={
            "model": model,
            "transfer": transfer,
            "log_folder": logs,
            "router": config.router.model_copy(update={"access": rooted(config.router.access, folder)}),
            "tls": rooted(config.tls, folder),
            "redis": rooted(config.redis, folder),
        }
    )


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the YAML, for editors and other validators."""
    return ClusterConfig.model_json_schema()
