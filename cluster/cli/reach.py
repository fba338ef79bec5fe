"""How commands reach a cluster: where its gateways are, what to show them, how to be sure of them.

Without `--address` all of it comes from the run file of a cluster of this machine; an option says otherwise.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cluster import run_file
from core.errors import ConfigError, ServingError
from core.tls import ClientTls
from tandem_client import Client

T = TypeVar("T")
_SYSTEM = "system"
Cluster = Annotated[str | None, typer.Option("--cluster", help="Name of the cluster; needed when several are up.")]
Address = Annotated[
    str | None, typer.Option("--address", help="host:port of a gateway (or several, with commas), instead of looking.")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="TANDEM_API_KEY", show_envvar=True, help="Better in the environment than here."),
]
TlsCa = Annotated[
    str | None,
    typer.Option("--tls-ca", help="TLS: PEM file of the authority of the gateways' certificates, or `system`."),
]
TlsCertificate = Annotated[
    Path | None, typer.Option("--tls-cert", help="TLS: PEM file with a certificate and its key, to show to gateways.")
]
TlsName = Annotated[
    str | None, typer.Option("--tls-name", help="TLS: what the gateways' certificates are for, if not their address.")
]


@dataclass(frozen=True, slots=True)
class Reach:
    """How to get to gateways."""

    address: str
    api_key: str = field(default="", repr=False)
    tls: ClientTls | None = None

    def each(self) -> "list[Reach]":
        """Return one for every gateway."""
        return [Reach(one, self.api_key, self.tls) for one in self.address.split(",")]

    def ask(self, use: Callable[[Client], Coroutine[Any, Any, T]], *, tenant: str = "") -> T:
        """Run `use` with a client."""

        async def run() -> T:
            async with Client(
                self.address, tenant=tenant, api_key=self.api_key, tls=self.tls, on_retry=_say_retry
            ) as client:
                return await use(client)

        return asyncio.run(run())


def reach(
    cluster: str | None,
    address: str | None,
    api_key: str | None,
    tls_ca: str | None,
    tls_certificate: Path | None,
    tls_name: str | None,
) -> Reach:
    """Return what the options say, or the run file.

    Raises:
        ConfigError: no cluster is up here, or several are; or it is still coming up.
    """
    tls = None
    if tls_ca or tls_certificate or tls_name:
        tls = ClientTls(
            ca=None if tls_ca in (None, _SYSTEM) else Path(tls_ca),
            certificate=tls_certificate,
            private_key=tls_certificate,
            server_name=tls_name or "",
        )
    api_key = (api_key or "").strip()  # an environment variable filled from a file has a line end
    if address:
        return Reach(address, api_key, tls)
    record = run_file.find(cluster)
    if not record.is_ready:
        raise ConfigError(f"cluster {record.cluster} is still coming up")
    return Reach(record.gateway, api_key or record.api_key, tls or record.tls)


def _say_retry(error: ServingError, wait_s: float) -> None:
    print(f"refused for now: {error}; trying again in {wait_s:.1f} s", file=sys.stderr)
