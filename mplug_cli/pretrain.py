"""``mplug pretrain``: run a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import options
from mplug_cli.launch import processes_wanted, run_in_processes
from mplug_cli.recipe import as_yaml
from mplug_cli.streams import write_line
from mplug_cli.watch import watching
from mplug_core.errors import CheckpointError

if TYPE_CHECKING:
    from mplug_core.recipe import Recipe


def pretrain(
    recipe: options.RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Fields of the recipe to change: optimizer.lr=3e-4"),
    ] = None,
    resume: options.Resume = "auto",
    run: options.RunFolder = None,
    devices: options.Devices = "auto",
    dry_run: options.DryRun = False,
    quiet: options.OnlyErrors = False,
) -> None:
    """Pre-train a model as a recipe says.

    Alone it uses all GPUs of this machine; torchrun, DeepSpeed's launcher and srun start it on many.
    """
    from mplug_core.recipe import load_recipe

    run_recipe(load_recipe(recipe, overrides or []), run, resume, devices, dry_run, quiet)


def run_recipe(settings: Recipe, folder: str | None, resume: str, devices: str, dry_run: bool, quiet: bool) -> None:
    """Train as a recipe says, or print it; ``folder`` replaces its run.folder."""
    from mplug_core.recipe import nearest

    if folder is not None:  # not as an override: a path is no YAML
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"folder": folder})})
    if resume not in ("auto", "never") and not Path(resume).exists():
        raise CheckpointError(f"no checkpoint {resume}{nearest(resume, ('auto', 'never'))}", "auto, never or a path")
    if dry_run:
        write_line(as_yaml(settings))
        return

    count = processes_wanted(devices, settings.engine.name)
    if count > 1:
        if code := run_in_processes(count, sys.argv[1:]):
            raise typer.Exit(code)
        return

    from mplug_core.training.trainer import train

    with watching(quiet) as watch:
        train(settings, resume, watch)
