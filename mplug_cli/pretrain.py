"""``mplug pretrain``: run a recipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import options, show
from mplug_cli.launch import processes_wanted, run_in_processes
from mplug_cli.preflight import show_check
from mplug_cli.watch import watching
from mplug_core.errors import CheckpointError, UsageError

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
    device_name: options.DeviceNames = None,
    as_json: options.DryRunJson = False,
    quiet: options.OnlyErrors = False,
) -> None:
    """Pre-train a model as a recipe says.

    Alone it uses all GPUs of this machine; torchrun, DeepSpeed's launcher and srun start it on many.
    """
    from mplug_core.recipe import load_recipe

    planned = Planned(dry_run, device_name, as_json)
    run_recipe(load_recipe(recipe, overrides or []), run, resume, devices, planned, quiet)


@dataclass(frozen=True)
class Planned:
    """Whether to check a run instead of doing it, and what of the check to print."""

    dry_run: bool
    device_names: list[str] | None
    as_json: bool

    def __post_init__(self) -> None:
        if not self.dry_run and (self.device_names or self.as_json):
            given = "--json" if self.as_json else "--device-name"
            raise UsageError(f"{given} is for --dry-run", "add --dry-run; a run's figures are in its metrics.jsonl")


def run_recipe(settings: Recipe, folder: str | None, resume: str, devices: str, planned: Planned, quiet: bool) -> None:
    """Train as a recipe says, or check that; ``folder`` replaces its run.folder."""
    from mplug_core.recipe import nearest

    if folder is not None:  # not as an override: a path is no YAML
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"folder": folder})})
    if resume not in ("auto", "never") and not Path(resume).exists():
        raise CheckpointError(f"no checkpoint {resume}{nearest(resume, ('auto', 'never'))}", "auto, never or a path")
    if planned.dry_run:
        # of more devices than there are here, too
        count = int(devices) if devices.isdigit() and int(devices) else processes_wanted(devices, settings.engine.name)
        with show.downloads(quiet):
            show_check(settings, count, planned.device_names, planned.as_json)
        return

    bring_start(settings, quiet)
    count = processes_wanted(devices, settings.engine.name)
    if count > 1:
        if code := run_in_processes(count, sys.argv[1:]):
            raise typer.Exit(code)
        return

    from mplug_core.training.trainer import train

    with watching(quiet) as watch:
        train(settings, resume, watch)


def bring_start(settings: Recipe, quiet: bool) -> None:
    """Have the model that a run starts from on this machine, before its processes look for it."""
    from mplug_core.weights import hub

    start = settings.start.model
    if start and hub.is_remote(start) and not Path(start).exists():
        with show.downloads(quiet):
            hub.find(start)
