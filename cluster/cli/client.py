"""Commands of `tandem` that talk to a running cluster: status, generate, explain, profile decisions."""

import dataclasses
import json
import sys
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from cluster import run_file
from cluster.cli.decisions_view import decisions_table
from cluster.cli.explain_view import decision_view, route_table
from cluster.cli.reach import Address, ApiKey, Cluster, TlsCa, TlsCertificate, TlsName, reach
from cluster.cli.status_view import placement_line, status_table, transfer_line
from core.errors import InvalidRequest
from tandem_client import Client, ClusterStatus, KvDecision, Message, RouteDecision, Sampling, Service

T = TypeVar("T")
_PAGE_WIDTH = 120  # of tables that go to a file or a pipe


def add_commands(app: typer.Typer, profile_app: typer.Typer) -> None:
    """Register them."""
    for command in (status, generate, explain):
        app.command()(command)
    profile_app.command("decisions")(profile_decisions)


def page() -> Console:
    """Return where tables go: the terminal, or a file or a pipe with a width of its own."""
    console = Console()
    return console if console.is_terminal else Console(width=_PAGE_WIDTH)


def status(
    cluster: Cluster = None,
    address: Address = None,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_name: TlsName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the workers of a running cluster.

    Examples:

        tandem status

        tandem status --address 10.0.0.5:50051 --json
    """
    gateways = reach(cluster, address, api_key, tls_ca, tls_certificate, tls_name)
    http = "" if address else run_file.find(cluster).http

    async def ask(client: Client) -> ClusterStatus:
        return await client.status()

    found = gateways.ask(ask)
    if as_json:
        print(json.dumps(dataclasses.asdict(found) | {"http": http}, indent=2))
    else:
        page().print(status_table(found, gateways.address, http))


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message of a chat.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="At most so many.")] = 128,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from this part of the probability.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Equal seeds, equal samples.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    deadline_s: Annotated[
        float | None, typer.Option("--deadline", help="End it after so many seconds, retries included.")
    ] = None,
    kv_quality: Annotated[
        str | None,
        typer.Option("--kv-quality", help="Of the KV cache on its way: exact, high, balanced, or 0 to 1."),
    ] = None,
    tenant: Annotated[str, typer.Option("--tenant", help="On whose account.")] = "",
    service_class: Annotated[
        str, typer.Option("--class", help="interactive, deadline or batch; else the tenant's.")
    ] = "",
    priority: Annotated[
        int | None, typer.Option("--priority", help="-10 to 10, against the same tenant's; larger goes first.")
    ] = None,
    ttft_s: Annotated[
        float | None, typer.Option("--ttft", help="Target: seconds to the first token; refused if foreseen to miss it.")
    ] = None,
    tpot_s: Annotated[float | None, typer.Option("--tpot", help="Target: seconds per token after it.")] = None,
    finish_s: Annotated[float | None, typer.Option("--finish", help="Target: seconds to the last token.")] = None,
    session: Annotated[str, typer.Option("--session", help="Its requests rather go to the same workers.")] = "",
    why: Annotated[bool, typer.Option("--why", help="Say on standard error who served it and why.")] = False,
    cluster: Cluster = None,
    address: Address = None,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_name: TlsName = None,
) -> None:
    """Stream a generation to standard output.

    What is refused for now is tried twice more, after as long as the gateway says; standard error tells of the wait.

    Examples:

        tandem generate "Return a list of" --temperature 0

        tandem generate --chat "What does len() do?" -n 60 --seed 7

        tandem generate "Return a list of" --kv-quality balanced      # and say on standard error how the KV went

        tandem generate "import os" --class batch --why               # and who served it, and why
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    roles = [Message("system", system)] if system else []
    messages = [*roles, Message("user", text)] if chat or system else text
    sampling = Sampling(max_tokens=max_tokens)
    if temperature is not None:
        sampling["temperature"] = temperature
    if top_p is not None:
        sampling["top_p"] = top_p
    if seed is not None:
        sampling["seed"] = seed
    if stop:
        sampling["stop"] = stop

    quality = _quality(kv_quality) if kv_quality is not None else None

    service = Service(service_class, priority, ttft_s, tpot_s, finish_s, session)

    async def stream(client: Client) -> None:
        pieces = client.generate(messages, deadline_s=deadline_s, kv_quality=quality, service=service, **sampling)
        async for piece in pieces:
            print(piece.text, end="", flush=True)
            if piece.summary is not None:
                print(flush=True)
                if quality is not None:
                    print(transfer_line(piece.summary.placement), file=sys.stderr)
                if why:
                    print(placement_line(piece.summary), file=sys.stderr)

    reach(cluster, address, api_key, tls_ca, tls_certificate, tls_name).ask(stream, tenant=tenant)


def explain(
    request_id: Annotated[str, typer.Argument(help="Of the request; without it, the last decisions.")] = "",
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="Decisions per gateway.")] = 20,
    cluster: Cluster = None,
    address: Address = None,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_name: TlsName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: with every candidate's terms.")] = False,
) -> None:
    """Tell why requests were placed where they were, what else was possible, and how it turned out.

    Each gateway keeps its last decisions. What the terms mean is in docs/router.md.

    Examples:

        tandem explain

        tandem explain chat-17 --json
    """

    async def ask(client: Client) -> list[RouteDecision]:
        return await client.explain(request_id, last=last)

    found: list[RouteDecision] = []
    gateways = reach(cluster, address, api_key, tls_ca, tls_certificate, tls_name)
    for gateway in gateways.each():  # each knows its own requests only
        found += gateway.ask(ask)
    if request_id and not found:
        raise InvalidRequest("request_id", f"no gateway knows a decision on {request_id!r} (any more)")
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    elif request_id:
        for one in found:
            page().print(decision_view(one))
    else:
        page().print(route_table(sorted(found, key=lambda one: one.age_s)[:last]))


def profile_decisions(
    worker: Annotated[str, typer.Option("--worker", help="Of this prefill worker only.")] = "",
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="Transfers per prefill worker.")] = 20,
    cluster: Cluster = None,
    address: Address = None,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_name: TlsName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: with every candidate's terms.")] = False,
) -> None:
    """Show which profiles the last KV transfers of a running cluster used, and why.

    Examples:

        tandem profile decisions

        tandem profile decisions --worker prefill-0 --last 100 --json
    """

    async def ask(client: Client) -> list[KvDecision]:
        return await client.kv_decisions(worker, last=last)

    found = reach(cluster, address, api_key, tls_ca, tls_certificate, tls_name).ask(ask)
    if as_json:
        print(json.dumps([{"prefill_worker": one.prefill_worker, **one.details} for one in found], indent=2))
    else:
        page().print(decisions_table(found))


def _quality(text: str) -> str | float:
    """Return a number if it is one; what a word means is the gateway's affair."""
    try:
        return float(text)
    except ValueError:
        return text
