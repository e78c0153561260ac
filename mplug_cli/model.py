"""``mplug model``: what models are, other forms of them, and where they go."""

from __future__ import annotations

import typer

from mplug_cli.export import export
from mplug_cli.info import info
from mplug_cli.push import push

model = typer.Typer(name="model", help="Look at models, export and publish them.", no_args_is_help=True)


@model.callback()
def _group() -> None:
    """Look at models, export and publish them."""


model.command("info")(info)
model.command("export")(export)
model.command("push")(push)
