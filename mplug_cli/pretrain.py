"""``mplug pretrain``: run a recipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import options, show
from mplug_cli.launch import is_count, processes_wanted, run_in_processes
from mplug_cli.preflight import show_check
from mplug_cli.streams import write_line
from mplug_cli.watch import watching
from mplug_core.errors import CheckpointError, UsageError
from mplug_core.json_text import to_json

if TYPE_CHECKING:
    from mplug_core.recipe import Recipe
    from mplug_core.training.trial import Share


def pretrain(
    recipe: options.RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Fields of the recipe to change: optimizer.lr=3e-4"),
    ] = None,
    data: options.Data = None,
    resume: options.Resume = "auto",
    allow_changed_data: options.AllowChangedData = False,
    run: options.RunFolder = None,
    devices: options.Devices = "auto",
    steps: options.Try = None,
    dry_run: options.DryRun = False,
    device_name: options.DeviceNames = None,
    as_json: options.DryRunJson = False,
    quiet: options.OnlyErrors = False,
) -> None:
    """Pre-train a model as a recipe says.

    Alone it uses all GPUs of this machine; torchrun, DeepSpeed's launcher and srun start it on many.
    """
    from mplug_core.recipe import load_recipe

    planned = Planned(dry_run, device_name, as_json, steps)
    changes = [*(overrides or []), *fields({"data.root": data})]
    run_recipe(load_recipe(recipe, changes), run, resume, devices, planned, quiet, allow_changed_data)


def fields(given: dict[str, str | None]) -> list[str]:
    """Options that are fields of a recipe as overrides, quoted: a path may look like YAML."""
    return [f"{key}={to_json(value)}" for key, value in given.items() if value is not None]


@dataclass(frozen=True)
class Planned:
    """Whether to check a run instead of doing it and what of the check to print, or how many steps to try."""

    dry_run: bool
    device_names: list[str] | None
    as_json: bool
    tried: int | None = None

    def __post_init__(self) -> None:
        if not self.dry_run and (self.device_names or self.as_json):
            given = "--json" if self.as_json else "--device-name"
            raise UsageError(f"{given} is for --dry-run", "add --dry-run; a run's figures are in its metrics.jsonl")
        if self.dry_run and self.tried:
            raise UsageError("--try runs, and --dry-run doesn't", "leave one of the two out")


def run_recipe(
    settings: Recipe, folder: str | None, resume: str, devices: str, planned: Planned, quiet: bool,
    allow_changed_data: bool = False,
) -> None:  # fmt: skip
    """Train as a recipe says, or check that; ``folder`` replaces its run.folder."""
    from mplug_core.recipe import nearest
    from mplug_core.training.run_folder import RUN, TRY, check_run_folder, try_folder

    if folder is not None:  # not as an override: a path is no YAML
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"folder": folder})})
    if resume not in ("auto", "never") and not os.path.exists(resume):
        raise CheckpointError(f"no checkpoint {resume}{nearest(resume, ('auto', 'never'))}", "auto, never or a path")
    if planned.tried and resume != "auto":
        raise UsageError("a try starts anew each time", "leave --resume out")
    if planned.dry_run:
        # of more devices than there are here, too
        count = int(devices) if is_count(devices) else processes_wanted(devices, settings.engine.name)
        with show.downloads(quiet):
            show_check(settings, count, planned.device_names, planned.as_json, quiet)
        return

    check_run_folder(try_folder(settings) if planned.tried else settings.run_folder, TRY if planned.tried else RUN)
    bring_start(settings, quiet)
    count = processes_wanted(devices, settings.engine.name)
    if count > 1:
        if code := run_in_processes(count, sys.argv[1:]):
            raise typer.Exit(code)
        return

    if planned.tried:
        from mplug_core.training.trial import try_run

        with watching(quiet) as watch:
            shares = try_run(settings, planned.tried, watch)
        for line in estimate_lines(shares):
            write_line(line)
        return
    from mplug_core.training.trainer import train

    with watching(quiet) as watch:
        train(settings, resume, watch, **({"allow_changed_data": True} if allow_changed_data else {}))


def bring_start(settings: Recipe, quiet: bool) -> None:
    """Have the model that a run starts from on this machine, before its processes look for it."""
    from mplug_core.weights import hub

    start = settings.start.model
    if start and hub.is_remote(start) and not os.path.exists(start):
        with show.downloads(quiet):
            hub.find(start)


def estimate_lines(shares: Sequence[Share]) -> list[str]:
    """What the parts of a whole run take, and all of it."""
    from mplug_core.training.figures import clock

    if not shares:
        return []
    rows = [(share.part, f"{share.count} x {share.each_seconds:.3g} s", clock(share.seconds)) for share in shares]
    rows.append(("the whole run", "", clock(sum(share.seconds for share in shares))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{part:<{widths[0]}}  {pace:>{widths[1]}}  {time:>{widths[2]}}" for part, pace, time in rows]
