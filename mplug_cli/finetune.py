"""``mplug finetune``: train a model further, on a task."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from mplug_cli import options
from mplug_cli.pretrain import Planned, run_recipe


def finetune(
    recipe: options.RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Fields of the recipe to change: optimizer.lr=3e-5"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Start: a model or run folder, a released checkpoint (.pth), hf:org/name, ms:org/name, a URL, a name "
            "of mplug model ls, or mini, the embedded model. "
            "Default: start.model of the recipe, else $MPLUG_MODEL, else mini.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="Where the data is; the same as data.root=PATH.")
    ] = None,
    run: options.RunFolder = None,
    resume: options.Resume = "auto",
    devices: options.Devices = "auto",
    dry_run: options.DryRun = False,
    device_name: options.DeviceNames = None,
    as_json: options.DryRunJson = False,
    quiet: options.OnlyErrors = False,
) -> None:
    """Fine-tune a model as a recipe says.

    The architecture and the vocabulary are those of the model that it starts from; the recipe's model section, which
    may be left out, says what changes. The run folder holds best/ (where the recipe names run.best) and model/, the
    last.
    """
    from mplug_core.recipe import MODEL_VARIABLE, load_recipe

    changes = list(overrides or [])
    # quoted: a path may look like YAML
    changes += [f"{key}={json.dumps(value)}" for key, value in (("start.model", model), ("data.root", data)) if value]
    default = {"start": {"model": os.environ.get(MODEL_VARIABLE) or "mini"}}
    planned = Planned(dry_run, device_name, as_json)
    run_recipe(load_recipe(recipe, changes, default), run, resume, devices, planned, quiet)
