"""How programs on the launcher's machine reach the doors of its cluster: TLS, and a key of their own.

With access control on, every launch makes a key for itself, which the gateways are told the hash of. The run file,
which only its user can read, passes it on to `tandem status` and the like; it dies with the launch.
"""

from dataclasses import dataclass, field

from cluster.config import ClusterConfig
from core.tls import ClientTls
from router.access.config import ApiKeyConfig
from router.access.keys import hash_of, new_key
from router.access.principal import Role

OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client needs beside the address. An empty key: none."""

    api_key: str = field(default="", repr=False)
    tls: ClientTls | None = None


NO_CREDENTIALS = Credentials()


def with_credentials(config: ClusterConfig) -> tuple[ClusterConfig, Credentials]:
    """Return the configuration with a fresh key in it, if keys are asked for, and what is needed to come in."""
    tls = config.tls.client if config.tls.public is not None else None
    access = config.router.access
    if not access.enabled:
        return config, Credentials(tls=tls)
    key = new_key()
    kept = ApiKeyConfig(name=OPERATOR, sha256=hash_of(key), roles=frozenset(Role))
    router = config.router.model_copy(update={"access": access.model_copy(update={"keys": (*access.keys, kept)})})
    return config.model_copy(update={"router": router}), Credentials(key, tls)
