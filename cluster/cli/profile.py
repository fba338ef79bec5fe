"""`tandem profile`: search for KV profiles of a model, show a library, measure a library again.

Loads torch only when a command runs.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from core.errors import ConfigError

if TYPE_CHECKING:
    from kv_transfer.profile import ProfileLibrary

profile_app = typer.Typer(no_args_is_help=True, help="Compression profiles of the KV transfer.")

_PAGE_WIDTH = 120
_MIB = 2**20
Model = Annotated[Path, typer.Argument(help="Checkpoint folder.")]
Library = Annotated[
    Path | None, typer.Option(help="Library file; default: kv_profiles.yaml in the checkpoint's folder.")
]
Prompts = Annotated[
    Path | None, typer.Option(help="JSONL of validation prompts; default: validation_prompts.jsonl in that folder.")
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of the model.")]
MaxPrompts = Annotated[int | None, typer.Option(min=2, help="Use only that many prompts of each split.")]


@profile_app.command("search")
def profile_search(
    model: Model,
    library: Library = None,
    prompts: Prompts = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of what was measured; default: next to the library.")] = None,
    exhaustive: Annotated[bool, typer.Option(help="Judge every candidate as well, and compare.")] = False,
    threads: Threads = 1,
    max_prompts: MaxPrompts = None,
) -> None:
    """Measure candidate pipelines on a model and write the library of those that nothing else beats.

    What was measured is kept in a journal next to the library: a search that was interrupted goes on from there.
    Remove the journal to measure anew.

    Examples:

        tandem profile search models/tiny

        tandem profile search /models/my-model --prompts prompts.jsonl --library my_profiles.yaml
    """
    from profile_search.session import SearchSettings, run_search

    output = library or model / "kv_profiles.yaml"
    settings = SearchSettings(
        model=model,
        output=output,
        prompts=prompts,
        picture=plot or output.with_suffix(".png"),
        num_threads=threads,
        max_prompts=max_prompts,
        is_exhaustive=exhaustive,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console()) as progress:
        task = progress.add_task("starting", total=None)

        def told(stage: str, done: int, of: int) -> None:
            progress.update(task, description=stage, completed=done, total=of)

        try:
            report = run_search(settings, told)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from what was measured", file=sys.stderr)
            raise
    judged, everything = report.num_judged, report.num_exhaustive
    print(
        f"{report.num_candidates} candidates; {judged} prompts judged, {everything} would be all: "
        f"{everything / max(judged, 1):.1f} times as many"
    )
    for row in report.comparison:
        print(
            f"floor {row.floor:.3f}: found {row.found_ratio:.2f}x, of all {row.exhaustive_ratio:.2f}x: "
            f"{'same' if row.is_same else 'DIFFERENT'}"
        )
    _console().print(_table_of(report.library))
    print(f"written: {output}")


@profile_app.command("show")
def profile_show(
    library: Annotated[Path, typer.Argument(help="Library file, or the folder of a checkpoint that has one.")],
) -> None:
    """Show the profiles of a library.

    Example:

        tandem profile show models/tiny
    """
    from kv_transfer.profile import LIBRARY_NAME, load_library

    _console().print(_table_of(load_library(library / LIBRARY_NAME if library.is_dir() else library)))


@profile_app.command("validate")
def profile_validate(
    model: Model,
    library: Library = None,
    prompts: Prompts = None,
    threads: Threads = 1,
    max_prompts: MaxPrompts = None,
) -> None:
    """Measure the profiles of a library again, on this machine and model; exit code 1 when something does not hold.

    What is stated holds for the prompts that the library was made with: with fewer of them, or with others, ratios are
    not compared, and agreement is refuted only by an interval that lies below the stated one.

    Example:

        tandem profile validate models/tiny
    """
    from kv_transfer.machine import machine_fingerprint
    from kv_transfer.profile import LIBRARY_NAME, load_library
    from profile_search.validation import validate

    loaded = load_library(library or model / LIBRARY_NAME)
    if loaded.machine != machine_fingerprint():
        print(f"times are not compared: they were measured on {loaded.machine}")
    failed = 0
    for finding in validate(loaded, model, prompts, num_threads=threads, max_prompts=max_prompts):
        failed += bool(finding.broken)
        quality = "exact" if finding.quality is None else f"agreement {finding.quality.agreement:.4f}"
        print(f"{finding.profile.name:12} {finding.cost.ratio:6.2f}x {quality}: {finding.verdict}")
    if failed:
        raise ConfigError(f"{failed} of {len(loaded.profiles)} profiles no longer hold; run `tandem profile search`")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PAGE_WIDTH)


def _table_of(library: "ProfileLibrary") -> Table:
    table = Table(
        title=f"KV profiles of {library.model}", caption=f"times: {library.machine}, one core, bytes before coding"
    )
    for name in ("profile", "ratio", "agreement (95 %)", "KL, nats", "encode GB/s", "decode GB/s"):
        table.add_column(name, justify="left" if name == "profile" else "right")
    for profile in library.profiles:
        quality = profile.quality
        table.add_row(
            profile.name,
            f"{profile.ratio:.2f}",
            "exact"
            if quality is None
            else f"{quality.agreement:.4f} ({quality.agreement_low:.4f} - {quality.agreement_high:.4f})",
            "0" if quality is None else f"{quality.kl:.5f}",
            *(f"{_MIB / time.seconds(_MIB) / 1e9:.2f}" for time in (profile.encode, profile.decode)),
        )
    return table
