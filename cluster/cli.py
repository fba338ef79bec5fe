"""The `tandem` command. Failures are one line on standard error and exit code 1."""

import asyncio
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from cluster import detach, run_file
from cluster.config import ClusterConfig, json_schema, load_cluster_config
from cluster.decisions_view import decisions_table
from cluster.launcher import Launcher
from cluster.own_session import enter_own_session
from cluster.profile_cli import profile_app
from cluster.progress import LineProgress, LiveProgress
from cluster.serve import Interrupted, serve
from cluster.view import status_table, transfer_line
from core.errors import ConfigError, ServingError
from core.telemetry import setup_logging
from tandem_client import Client, ClusterStatus, KvDecision, Message, Sampling

app = typer.Typer(
    name="tandem",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Tandem: a disaggregated LLM serving cluster.\n\nStart with `tandem demo`, or `tandem up -f cluster.yaml`.",
)
config_app = typer.Typer(no_args_is_help=True, help="The configuration file.")
app.add_typer(config_app, name="config")
app.add_typer(profile_app, name="profile")

T = TypeVar("T")
_PAGE_WIDTH = 120  # of tables that go to a file or a pipe
Cluster = Annotated[str | None, typer.Option("--cluster", help="Name of the cluster; needed when several are up.")]
Address = Annotated[str | None, typer.Option("--address", help="host:port of a gateway, instead of looking for one.")]


@app.command()
def up(
    file: Annotated[Path, typer.Option("--file", "-f", help="The cluster's YAML.")],
    detach_: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is ready; it goes on alone.")] = False,
    detached_child: Annotated[bool, typer.Option(detach.DETACHED, hidden=True)] = False,
) -> None:
    """Bring a cluster up and serve until Ctrl-C.

    Examples:

        tandem up -f examples/cluster.yaml

        tandem up -f examples/cluster.yaml --detach && tandem status
    """
    config = load_cluster_config(file)
    if detach_:
        raise typer.Exit(detach.start_detached(file, lambda line: print(line, flush=True)))
    if not detached_child:  # which has a session of its own already
        enter_own_session()
    setup_logging("launcher", level="WARNING" if sys.stdout.isatty() else config.log_level)
    console = Console()
    is_live = console.is_terminal and not detached_child
    progress = LiveProgress(console) if is_live else LineProgress(lambda line: print(line, flush=True))

    def on_ready(launcher: Launcher) -> None:
        print(f"cluster {config.name} is ready at {launcher.gateway_address}", flush=True)
        if detached_child:
            detach.become_detached(config.name)

    async def run() -> int:
        with progress if isinstance(progress, LiveProgress) else nullcontext():
            await serve(config, progress, source=str(file), on_ready=on_ready)
        return 0

    _launch(run())


@app.command()
def down(
    cluster: Cluster = None,
    deadline_s: Annotated[float, typer.Option("--deadline", help="Seconds to drain; then it is killed.")] = 60.0,
) -> None:
    """Drain and stop a cluster of this machine.

    Examples:

        tandem down

        tandem down --cluster tandem --deadline 5
    """
    record = run_file.find(cluster)
    graceful = detach.end_launcher(record, deadline_s)
    print(f"cluster {record.cluster} is down" + ("" if graceful else " (it had to be killed)"))


@app.command()
def status(
    cluster: Cluster = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the workers of a running cluster.

    Examples:

        tandem status

        tandem status --address 10.0.0.5:50051 --json
    """
    gateway = _gateway(cluster, address)

    async def ask(client: Client) -> ClusterStatus:
        return await client.status()

    found = _with_client(gateway, ask)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_PAGE_WIDTH)
        console.print(status_table(found, gateway))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message of a chat.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1)] = 128,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    deadline_s: Annotated[float | None, typer.Option("--deadline", help="Seconds for all of it.")] = None,
    kv_quality: Annotated[
        str | None,
        typer.Option("--kv-quality", help="Of the KV cache on its way: exact, high, balanced, or 0 to 1."),
    ] = None,
    tenant: Annotated[str, typer.Option("--tenant", help="On whose account.")] = "",
    cluster: Cluster = None,
    address: Address = None,
) -> None:
    """Stream a generation to standard output.

    Examples:

        tandem generate "Return a list of" --temperature 0

        tandem generate --chat "What does len() do?" -n 60 --seed 7

        tandem generate "Return a list of" --kv-quality balanced      # and say on standard error how the KV went
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

    async def stream(client: Client) -> None:
        async for piece in client.generate(messages, deadline_s=deadline_s, kv_quality=quality, **sampling):
            print(piece.text, end="", flush=True)
            if piece.summary is not None and quality is not None:
                print(flush=True)
                print(transfer_line(piece.summary.placement), file=sys.stderr)
        if quality is None:
            print()

    _with_client(_gateway(cluster, address), stream, tenant)


@profile_app.command("decisions")
def profile_decisions(
    worker: Annotated[str, typer.Option("--worker", help="Of this prefill worker only.")] = "",
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="Transfers per prefill worker.")] = 20,
    cluster: Cluster = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: with every candidate's terms.")] = False,
) -> None:
    """Show which profiles the last KV transfers of a running cluster used, and why.

    Examples:

        tandem profile decisions

        tandem profile decisions --worker prefill-0 --last 100 --json
    """

    async def ask(client: Client) -> list[KvDecision]:
        return await client.kv_decisions(worker, last=last)

    found = _with_client(_gateway(cluster, address), ask)
    if as_json:
        print(json.dumps([{"prefill_worker": one.prefill_worker, **one.details} for one in found], indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_PAGE_WIDTH)
        console.print(decisions_table(found))


@app.command()
def demo() -> None:
    """Bring up 2 prefill and 2 decode workers on the bundled model, serve a dozen requests, tell how it went.

    Example:

        tandem demo
    """
    from cluster.demo import run_demo  # it alone needs what it imports

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PAGE_WIDTH)
    enter_own_session()
    _launch(run_demo(console))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the cluster's YAML.

    Example:

        tandem config schema > cluster.schema.json
    """
    print(json.dumps(json_schema(), indent=2))


@config_app.command("check")
def config_check(file: Annotated[Path, typer.Option("--file", "-f", help="The cluster's YAML.")]) -> None:
    """Validate a YAML and print it with every default filled in.

    Example:

        tandem config check -f examples/cluster.yaml
    """
    config: ClusterConfig = load_cluster_config(file)
    print(config.model_dump_json(indent=2))


def _launch(launching: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a launcher to its end and leave the process. Everything was taken down by then but, perhaps, a thread.

    Not by way of the interpreter's end: Ray's part of it waits for daemons that may have been killed.
    """
    try:
        code = asyncio.run(launching)
    except ServingError as error:
        code = _tell(error)
    except KeyboardInterrupt:
        code = _tell(Interrupted("interrupted; nothing is left running"))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(error: ServingError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _gateway(cluster: str | None, address: str | None) -> str:
    if address:
        return address
    record = run_file.find(cluster)
    if not record.is_ready:
        raise ConfigError(f"cluster {record.cluster} is still coming up")
    return record.gateway


def _quality(text: str) -> str | float:
    """Return a number if it is one; what a word means is the gateway's affair."""
    try:
        return float(text)
    except ValueError:
        return text


def _with_client(address: str, use: Callable[[Client], Coroutine[Any, Any, T]], tenant: str = "") -> T:
    async def run() -> T:
        async with Client(address, tenant=tenant) as client:
            return await use(client)

    return asyncio.run(run())


def main() -> None:
    """Entry point of the console script and of `python -m cluster`."""
    try:
        app()
    except ServingError as error:
        sys.exit(_tell(error))
    except KeyboardInterrupt:
        sys.exit(130)
