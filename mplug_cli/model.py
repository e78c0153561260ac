"""``mplug model``: where models are, what they are, other forms of them, and where they go."""

from __future__ import annotations

import typer

from mplug_cli.convert import convert
from mplug_cli.export import export
from mplug_cli.groups import Group
from mplug_cli.info import info
from mplug_cli.pull import ls, pull
from mplug_cli.push import push

model = typer.Typer(
    name="model", cls=Group, help="Download, look at, convert, export and publish models.", no_args_is_help=True
)


@model.callback()
def _group() -> None:
    """Download, look at, convert, export and publish models."""


model.command("ls")(ls)
model.command("info")(info)
model.command("pull")(pull)
model.command("convert")(convert)
model.command("export")(export)
model.command("push")(push)
