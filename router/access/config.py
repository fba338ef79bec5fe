"""Configuration of access control."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from core.config import ConfigModel
from core.errors import InvalidRequest
from core.ids import parse_tenant
from router.access.principal import Role

FINGERPRINT_CHARACTERS = 12
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _tenant_name(text: str) -> str:
    try:
        return parse_tenant(text)
    except InvalidRequest as error:
        raise ValueError(error.problem) from error


def check_web_address(url: str) -> str:
    """Return a URL that keys may be fetched from. Raises: ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError("must be https:// (http:// only to this machine)")
    if parts.username or parts.password or not parts.hostname:
        raise ValueError("must have a host, and neither user nor password")
    return url


TenantName = Annotated[str, AfterValidator(_tenant_name)]
Roles = Annotated[frozenset[Role], Field(min_length=1)]
WebAddress = Annotated[str, AfterValidator(check_web_address)]
_INFERENCE: frozenset[Role] = frozenset({Role.INFERENCE})


class ApiKeyConfig(ConfigModel):
    """One API key. The key itself is written nowhere; `tandem keys create` shows it once."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.:@/-]+$", description="for people and logs")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key, in hexadecimal digits")
    tenant: TenantName = Field("", description="on whose account its requests go")
    roles: Roles = _INFERENCE
    created_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = Field(None, description="not valid from then on; absent: it does not expire")
    revoked_at: AwareDatetime | None = Field(None, description="not valid since then")

    @property
    def fingerprint(self) -> str:
        """Names the key and tells nothing of it."""
        return self.sha256[:FINGERPRINT_CHARACTERS]

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at


class KeysFile(ConfigModel):
    """What stands in a file of keys."""

    keys: tuple[ApiKeyConfig, ...] = ()

    @model_validator(mode="after")
    def _keys_are_distinct(self) -> Self:
        check_distinct(self.keys)
        return self


class JwtConfig(ConfigModel):
    """An issuer of tokens whose word is taken.

    Only public-key algorithms: a shared secret would let every holder of it make tokens.
    """

    issuer: str = Field(min_length=1, description="as it stands in the claim iss")
    audience: str = Field(min_length=1, description="that tokens must name in their claim aud")
    jwks_file: Path | None = Field(
        None, description="the issuer's public keys (JWKS); asked for again as those at a URL are"
    )
    jwks_url: WebAddress | None = Field(
        None, description="where the issuer publishes them; absent, as the file: asked by OpenID Connect discovery"
    )
    ca: Path | None = Field(None, description="PEM: authority of that server; absent: those that the system trusts")
    algorithms: tuple[
        Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"], ...
    ] = Field(("RS256", "ES256"), min_length=1)
    leeway_s: float = Field(30.0, ge=0, le=300, description="by which the clocks of issuer and gateway may differ")
    tenant_claim: str = Field("tenant", description="path of the claim, with dots")
    default_tenant: TenantName = Field("", description="of tokens without that claim")
    roles_claim: str = Field("roles", description="path of the claim, with dots: a list, or words of a string")
    role_names: dict[str, Role] = Field(
        {str(role): role for role in Role}, description="from the issuer's names; other names mean nothing"
    )
    default_roles: Roles = Field(_INFERENCE, description="of tokens without that claim")
    refresh_interval_s: float = Field(300.0, gt=0, description="how often the keys are asked for again")
    retry_interval_s: float = Field(
        10.0, gt=0, description="they are asked for at once for a key that is not known, but not more often than this"
    )
    fetch_timeout_s: float = Field(5.0, gt=0, le=60)
    max_stale_s: float = Field(86_400.0, gt=0, description="keys that could not be asked for again hold so long")

    @model_validator(mode="after")
    def _keys_have_one_source(self) -> Self:
        if self.jwks_file is not None and self.jwks_url is not None:
            raise ValueError("either jwks_file or jwks_url")
        if self.jwks_file is None and self.jwks_url is None:
            check_web_address(self.issuer)
        return self


class CertificateConfig(ConfigModel):
    """A client certificate: callers that show it and no other credential are this one."""

    name: str = Field(min_length=1, description="one of its alternative names, or its common name")
    tenant: TenantName = ""
    roles: Roles = _INFERENCE


class AccessConfig(ConfigModel):
    """Who may call. Off: everybody may do everything, and a request's tenant is the one that it names."""

    enabled: bool = False
    keys: tuple[ApiKeyConfig, ...] = Field((), description="API keys that hold as long as the process")
    keys_file: Path | None = Field(None, description="YAML: API keys below `keys`; read again when it changes")
    shared_keys: bool = Field(True, description="also those in the shared store, made by `tandem keys create`")
    reload_interval_s: float = Field(1.0, gt=0, description="how often the file and the store are asked for changes")
    jwt: tuple[JwtConfig, ...] = Field((), description="issuers of tokens; each has another name")
    certificates: tuple[CertificateConfig, ...] = Field((), description="only with router.tls.client_ca")
    max_credential_bytes: int = Field(8192, ge=256, description="of an authorization header")
    open_health: bool = Field(True, description="health checks need no credential")
    open_metrics: bool = Field(False, description="metrics at the public HTTP door need no credential, else an admin's")
    open_reflection: bool = Field(True, description="gRPC reflection and the OpenAPI document need no credential")
    audit_file: Path | None = Field(
        None, description="admin actions are written here, one JSON line each, beside the log"
    )

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        check_distinct(self.keys)
        for what, names in (
            ("jwt", [one.issuer for one in self.jwt]),
            ("certificates", [one.name for one in self.certificates]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{what}: the same name is there twice")
        return self


def check_distinct(keys: tuple[ApiKeyConfig, ...]) -> None:
    """Raises: ValueError, when one key is there twice."""
    prints = [key.fingerprint for key in keys]
    if len(set(prints)) != len(prints):
        raise ValueError("keys: the same key is there twice")
