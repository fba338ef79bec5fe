"""The `tandem` command. Failures are one line on standard error and exit code 1."""

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Coroutine
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cluster import detach, run_file
from cluster.cli import client
from cluster.cli.bench import bench
from cluster.cli.keys import keys_app
from cluster.cli.profile import profile_app
from cluster.cli.reach import Cluster
from cluster.config import ClusterConfig, json_schema, load_cluster_config
from cluster.launcher import Launcher
from cluster.own_session import enter_own_session
from cluster.progress import LineProgress, LiveProgress
from cluster.serve import Interrupted, serve
from core.errors import ServingError
from core.telemetry import setup_logging

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
app.add_typer(keys_app, name="keys")


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
    progress = LiveProgress(console) if is_live else LineProgress(lambda line: detach.say(line, config.name))

    def on_ready(launcher: Launcher) -> None:
        if launcher.http_urls:
            detach.say(f"OpenAI's API is at {launcher.http_urls}", config.name)
        detach.say(f"cluster {config.name} is ready at {launcher.gateway_address}", config.name)
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
def demo() -> None:
    """Bring up 2 prefill and 2 decode workers on the bundled model, serve a dozen requests, tell how it went.

    Example:

        tandem demo
    """
    from cluster.demo.run import run_demo  # it alone needs what it imports

    enter_own_session()
    _launch(run_demo(client.page()))


client.add_commands(app, profile_app)
app.command()(bench)


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


def main() -> None:
    """Entry point of the console script and of `python -m cluster`."""
    try:
        app()
    except ServingError as error:
        sys.exit(_tell(error))
    except KeyboardInterrupt:
        sys.exit(130)
