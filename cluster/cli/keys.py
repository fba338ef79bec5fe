"""`tandem keys`: API keys of a running cluster, or of a file that gateways read."""

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.cli.client import page
from cluster.cli.reach import Address, ApiKey, Cluster, TlsCa, TlsCertificate, TlsName, reach
from core.errors import InvalidRequest
from router.access.config import ApiKeyConfig
from router.access.key_file import read_keys, write_keys
from router.access.keys import checked_key, new_key
from router.access.principal import Role
from tandem_client import Client, KnownKey

keys_app = typer.Typer(no_args_is_help=True, help="API keys: who may call the gateways.")
_LIFETIME = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)\Z")
_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
File = Annotated[
    Path | None, typer.Option("--file", help="A file of keys (router.access.keys_file) instead of a running cluster.")
]


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Of whoever will use it, for logs and for `tandem keys list`.")],
    tenant: Annotated[str, typer.Option("--tenant", help="On whose account its requests go.")] = "",
    role: Annotated[
        list[Role] | None, typer.Option("--role", help="May be repeated; inference by default.", case_sensitive=False)
    ] = None,
    lifetime: Annotated[
        str | None, typer.Option("--lifetime", help="It expires after so long: 90s, 30m, 12h, 30d. Default: never.")
    ] = None,
    file: File = None,
    cluster: Cluster = None,
    address: Address = None,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_name: TlsName = None,
) -> None:
    """Make an API key and print it, this once: only its hash is kept.

    Examples:

        tandem keys create ann --tenant acme --lifetime 30d

        tandem keys create ops --role admin --role inference --file keys.yaml
    """
    roles, lifetime_s = frozenset(role or [Role.INFERENCE]), _seconds(lifetime)
    if file is not None:
        secret = new_key()
        key = checked_key(name, tenant, roles, secret, datetime.now(UTC), lifetime_s)
        write_keys(file, (*read_keys(file), key))
    else:

        async def ask(client: Client) -> str:
            _, made = await client.create_api_key(name, tenant=tenant, roles=sorted(roles), lifetime_s=lifetime_s)
            return made

        secret = reach(cluster, address, api_key, tls_ca, tls_certificate, tls_name).ask(ask)
    print(secret)
    print("keep it: it is shown this once, and only its hash is stored", file=sys.stderr)


@keys_app.command("list")
def list_(
    file: File = None,
    cluster: Cluster = None,
    address: Address = None,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_name: TlsName = None,
) -> None:
    """Show the API keys that there are, revoked and expired ones too.

    Examples:

        tandem keys list

        tandem keys list --file keys.yaml
    """
    if file is not None:
        known = [_known(key) for key in read_keys(file)]
    else:

        async def ask(client: Client) -> list[KnownKey]:
            return await client.list_api_keys()

        known = reach(cluster, address, api_key, tls_ca, tls_certificate, tls_name).ask(ask)
    page().print(_table(known, datetime.now(UTC)))


@keys_app.command()
def revoke(
    fingerprint: Annotated[str, typer.Argument(help="Of the key, as `tandem keys list` shows it.")],
    file: File = None,
    cluster: Cluster = None,
    address: Address = None,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_name: TlsName = None,
) -> None:
    """End an API key. Every gateway refuses it within a second or so; calls that run already go on.

    Examples:

        tandem keys revoke 3f9c1e07ab42

        tandem keys revoke 3f9c1e07ab42 --file keys.yaml
    """
    if file is not None:
        keys = read_keys(file)
        if fingerprint not in {key.fingerprint for key in keys}:
            raise InvalidRequest("fingerprint", f"no key in {file} has it")
        now = datetime.now(UTC)
        write_keys(file, tuple(_revoked(key, now) if key.fingerprint == fingerprint else key for key in keys))
    else:

        async def ask(client: Client) -> KnownKey:
            return await client.revoke_api_key(fingerprint)

        reach(cluster, address, api_key, tls_ca, tls_certificate, tls_name).ask(ask)
    print(f"key {fingerprint} is revoked")


def _revoked(key: ApiKeyConfig, now: datetime) -> ApiKeyConfig:
    return key if key.revoked_at is not None else key.model_copy(update={"revoked_at": now})


def _seconds(lifetime: str | None) -> float | None:
    if lifetime is None:
        return None
    match = _LIFETIME.match(lifetime)
    if match is None:
        raise InvalidRequest("lifetime", f"{lifetime!r} is no time like 90s, 30m, 12h or 30d")
    return float(match[1]) * _UNITS_S[match[2]]


def _known(key: ApiKeyConfig) -> KnownKey:
    return KnownKey(
        fingerprint=key.fingerprint,
        name=key.name,
        tenant=key.tenant,
        roles=tuple(sorted(key.roles)),
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        source="file",
    )


def _table(keys: list[KnownKey], now: datetime) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("fingerprint", "name", "tenant", "roles", "source", "created", "expires", "state"):
        table.add_column(column)
    for key in keys:
        roles = ", ".join(key.roles)
        state = _state(key, now)
        when = (_day(key.created_at), _day(key.expires_at))
        table.add_row(key.fingerprint, key.name, key.tenant or "-", roles, key.source, *when, state)
    return table


def _state(key: KnownKey, now: datetime) -> str:
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}"
    return "expired" if key.expires_at is not None and now >= key.expires_at else "valid"


def _day(when: datetime | None) -> str:
    return "-" if when is None else when.strftime("%Y-%m-%d %H:%M")
