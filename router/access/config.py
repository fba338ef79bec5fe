"""Configuration of access control."""

from datetime import datetime
from pathlib import Path
from typing import Self

from pydantic import AwareDatetime, Field, field_validator, model_validator

from core.config import ConfigModel
from core.errors import InvalidRequest
from core.ids import parse_tenant
from router.access.principal import Role


class GrantConfig(ConfigModel):
    """What a caller is given."""

    tenant: str = Field("", description="on whose account its requests go")
    roles: frozenset[Role] = Field(frozenset({Role.INFERENCE}), min_length=1)

    @field_validator("tenant")
    @classmethod
    def _tenant_is_a_name(cls, tenant: str) -> str:
        try:
            return parse_tenant(tenant)
        except InvalidRequest as error:
            raise ValueError(error.problem) from error


class ApiKeyConfig(ConfigModel):
    """One API key. The key itself is written nowhere; `tandem keys create` shows it once."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.:@/ -]+$", description="for people and logs")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key, in hexadecimal digits")
    grant: GrantConfig = GrantConfig()
    created_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = Field(None, description="not valid from then on; absent: it does not expire")
    revoked_at: AwareDatetime | None = Field(None, description="not valid since then")

    @property
    def fingerprint(self) -> str:
        """Names the key and tells nothing of it."""
        return self.sha256[:FINGERPRINT_CHARACTERS]

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at


FINGERPRINT_CHARACTERS = 12


class AccessConfig(ConfigModel):
    """Who may call. Off: everybody may do everything, and a request's tenant is the one that it names."""

    enabled: bool = False
    keys: tuple[ApiKeyConfig, ...] = Field((), description="API keys that hold as long as the process")
    keys_file: Path | None = Field(None, description="YAML list of API keys, read again when it changes")
    shared_keys: bool = Field(True, description="also those in the shared store, made by `tandem keys create`")
    reload_interval_s: float = Field(1.0, gt=0, description="how often the file and the store are asked for changes")
    max_credential_bytes: int = Field(8192, ge=256, description="of an authorization header")
    open_health: bool = Field(True, description="health checks need no credential")
    open_reflection: bool = Field(True, description="gRPC reflection needs no credential")

    @model_validator(mode="after")
    def _keys_are_distinct(self) -> Self:
        prints = [key.fingerprint for key in self.keys]
        if len(set(prints)) != len(prints):
            raise ValueError("keys: the same key is there twice")
        return self
