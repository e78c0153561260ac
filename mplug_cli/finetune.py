"""``mplug finetune``: train a model further, on a task."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mplug_cli import completion, options
from mplug_cli.pretrain import Planned, fields, run_recipe


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
            help=f"Start: {options.MODELS[0].lower()}{options.MODELS[1:]}, or mini, the embedded model. "
            "Default: start.model of the recipe, else $MPLUG_MODEL, else mini.",
            autocompletion=completion.models,
        ),
    ] = None,
    data: options.Data = None,
    run: options.RunFolder = None,
    resume: options.Resume = "auto",
    allow_changed_data: options.AllowChangedData = False,
    devices: options.Devices = "auto",
    steps: options.Try = None,
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

    changes = [*(overrides or []), *fields({"start.model": model or None, "data.root": data})]
    default = {"start": {"model": os.environ.get(MODEL_VARIABLE) or "mini"}}
    planned = Planned(dry_run, device_name, as_json, steps)
    run_recipe(load_recipe(recipe, changes, default), run, resume, devices, planned, quiet, allow_changed_data)
