"""Configuration of one gateway process."""

from pathlib import Path

from pydantic import Field

from core.config import ConfigModel
from core.kv_quality import KvQuality
from core.service_class import ServiceClass
from core.tls import PeerTls, ServerTls
from grammar.config import GrammarConfig
from router.access.config import AccessConfig
from router.admission.config import AdmissionConfig
from router.chat.tool_formats.known import ToolFormatName
from router.forwarding.config import ForwardingConfig
from router.http.config import DEFAULT_PORT, HttpConfig
from router.quotas.config import QuotasConfig
from router.replicas.config import SharingConfig
from router.resume.config import ResumeConfig
from router.routing.config import RoutingConfig


class MirrorConfig(ConfigModel):
    """The local mirror of the shared store."""

    poll_interval_s: float = Field(0.25, gt=0)
    forget_after_s: float = Field(3.0, ge=0, description="a record that left the store is kept so long: stores restart")
    kv_events_per_read: int = Field(256, ge=1)


class WorkerStreamConfig(ConfigModel):
    """The stream to each worker, and patience with it."""

    connect_timeout_s: float = Field(2.0, gt=0)
    reconnect_min_s: float = Field(0.05, gt=0)
    reconnect_max_s: float = Field(1.0, gt=0)
    accept_timeout_s: float = Field(2.0, gt=0, description="a worker that neither accepts nor rejects is lost")
    hold_timeout_s: float = Field(
        5.0,
        gt=0,
        description="KV of a late-bound prompt waits so long after the first token for a decode worker; then its "
        "prefill worker generates the rest",
    )
    max_losses: int = Field(2, ge=0, description="workers that one request may lose before it is given up")
    reservation_lease_s: float = Field(30.0, gt=0, description="decode blocks wait so long for the first offer")
    max_unread_commands: int = Field(16_384, ge=1)


class TenantConfig(ConfigModel):
    """What holds for the requests of one tenant."""

    kv_quality: KvQuality | None = Field(
        None, description="no transfer of its KV is of less quality than this, whatever its requests ask for"
    )
    prefix_group: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.:-]{1,64}$",
        description="tenants of a group share prefix caches, and can tell what others of it asked; absent: of none",
    )
    weight: float = Field(1.0, gt=0, description="its share of the cluster against other tenants that wait")
    service_class: ServiceClass = Field(
        ServiceClass.INTERACTIVE, description="of requests that ask for none; theirs may ask for any"
    )
    requests_per_minute: int | None = Field(None, ge=1, description="absent: unlimited")
    tokens_per_minute: int | None = Field(None, ge=1, description="prompt and generated; absent: unlimited")
    max_concurrent_requests: int | None = Field(None, ge=1, description="absent: unlimited")


class RouterConfig(ConfigModel):
    """One gateway."""

    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535, description="0 takes a free port")
    share_port: bool = Field(
        False,
        description="gateways of one machine that say so may have the same ports, of gRPC and of HTTP: each new "
        "connection goes to one of them; absent: a port that is taken is an error",
    )
    tls: ServerTls | None = Field(None, description="of the doors that clients come to; absent: none")
    worker_tls: PeerTls | None = Field(None, description="towards workers, who ask for it; absent: none")
    model_path: Path = Field(description="checkpoint folder: tokenizer, chat template, config.json")
    served_model_name: str = Field("", description="name that clients use; empty: the folder's name")
    max_model_len: int | None = Field(None, ge=1, description="lowers what config.json says")
    max_prompt_bytes: int = Field(4 * 2**20, ge=1, description="of the text, before tokenising")
    max_request_bytes: int = Field(
        8 * 2**20, ge=1, description="of a whole message from a client; larger ones are refused unread"
    )
    max_preparing: int = Field(64, ge=1, description="prompts that are tokenised, or wait for it, at once")
    inline_prompt_bytes: int = Field(16_384, ge=0, description="longer prompts are tokenised off the event loop")
    default_max_tokens: int = Field(1024, ge=1)
    chat_template: Path | None = Field(None, description="a Jinja file, instead of the checkpoint's own template")
    tool_format: ToolFormatName = Field(
        "auto", description="how the model writes tool calls; auto: as its chat template teaches it"
    )
    max_queued_requests: int = Field(1024, ge=1)
    max_queued_tokens: int = Field(4_000_000, ge=1)
    max_queued_bytes: int = Field(256 * 2**20, ge=1, description="that requests of the queue occupy, as estimated")
    max_active_requests: int = Field(16_384, ge=1)
    max_choices: int = Field(128, ge=1, description="answers that one call may ask for, over all its prompts")
    max_prompt_logprobs: int = Field(
        100_000,
        ge=1,
        description="log-probabilities of prompt tokens that one call may ask for, over all its prompts: every token "
        "has its own and those of the alternatives. So many come in one message, which takes an event loop tenths of a "
        "second to read",
    )
    request_timeout_s: float = Field(600.0, gt=0, description="deadline of a request whose client set none")
    no_workers_timeout_s: float = Field(5.0, ge=0, description="how long requests wait for the first worker of a role")
    retry_min_s: float = Field(0.02, gt=0, description="first wait after every worker refused; doubles, with jitter")
    retry_max_s: float = Field(0.5, gt=0)
    max_unread_tokens: int = Field(4096, ge=1, description="tokens kept for a slow reader before it is cut off")
    write_timeout_s: float = Field(30.0, gt=0, description="a client that takes no message for so long is cut off")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="of /metrics; 0 takes a free one; absent: not served"
    )
    metrics_host: str = "127.0.0.1"
    kv_quality: KvQuality = Field(
        "exact",
        description="of requests that ask for none: the least token agreement of the compression profile of their KV "
        "transfer; exact means lossless, high 0.99, balanced 0.97",
    )
    handoff_budget_s: float | None = Field(
        None,
        ge=0,
        description="of requests that ask for none: how long after the first token their KV may arrive; absent: as "
        "soon as it can",
    )
    tenants: dict[str, TenantConfig] = Field(default_factory=dict, description="by name, what holds for a tenant")
    default_tenant: TenantConfig = Field(TenantConfig(), description="what holds for tenants that are not named")
    access: AccessConfig = AccessConfig()
    grammar: GrammarConfig = GrammarConfig()
    http: HttpConfig = HttpConfig()
    admission: AdmissionConfig = AdmissionConfig()
    routing: RoutingConfig = RoutingConfig()
    mirror: MirrorConfig = MirrorConfig()
    workers: WorkerStreamConfig = WorkerStreamConfig()
    forwarding: ForwardingConfig = ForwardingConfig()
    sharing: SharingConfig = SharingConfig()
    quotas: QuotasConfig = QuotasConfig()
    resume: ResumeConfig = ResumeConfig()

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model_path.resolve().name

    @property
    def http_host(self) -> str:
        return self.http.host or self.host

    @property
    def http_port(self) -> int:
        """0: a free one, as for everybody who lets the gateway choose its port."""
        return (DEFAULT_PORT if self.port else 0) if self.http.port is None else self.http.port

    def tenant(self, name: str) -> TenantConfig:
        """Return what holds for the tenant of this name."""
        return self.tenants.get(name, self.default_tenant)

    def shared_salt(self, tenant: str) -> str:
        """Return what the block hashes of the tenant's group are salted with; empty: of no group."""
        group = self.tenant(tenant).prefix_group
        return "" if group is None else f"group {group}"  # with a space, so that no tenant is called like that
