"""``mplug model``: model folders and checkpoints."""

from __future__ import annotations

import typer

from mplug_cli.convert import convert

model = typer.Typer(name="model", help="Model folders and checkpoints.", no_args_is_help=True)


@model.callback()
def _group() -> None:
    """Model folders and checkpoints."""


model.command("convert")(convert)
