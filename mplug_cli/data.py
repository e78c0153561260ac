"""``mplug data``: make data sets and look into them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(name="data", help="Make data sets and look into them.", no_args_is_help=True)


@data.callback()
def _group() -> None:
    """Make data sets and look into them."""


@data.command()
def scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; a scenes folder there is replaced.")],
    n: Annotated[
        int, typer.Option("--n", min=1, help="Training scenes; val and held_out have a twentieth each.")
    ] = 10000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same scenes.")] = 0,
    size: Annotated[int, typer.Option("--size", min=32, max=1024, help="Pixels a side.")] = 96,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; default: one a core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Generate a small world: pictures with captions, questions, phrases, statements and entailment, all exact.

    Writes OUT/{train,val,held_out} with images and JSON Lines. held_out has colours and shapes together that train
    never has.
    """
    from mplug_core.data.scenes.folder import split_sizes, write_scenes

    workers = workers or os.cpu_count() or 1
    if quiet or not sys.stderr.isatty():
        totals = write_scenes(out, n, seed, size, workers)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("scenes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("scenes", total=sum(split_sizes(n).values()))
            totals = write_scenes(out, n, seed, size, workers, progress=lambda done: bar.advance(task, done))
    for split, records in totals.items():
        counts = ", ".join(f"{number} {kind}" for kind, number in records.items() if kind != "captions")
        typer.echo(f"{out / split}: {counts}")
