"""Groups of commands, whose help has the first sentence of each command whole."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

WHOLE = 10_000
"""Characters that no first sentence has."""


class Group(TyperGroup):
    """A group whose list of commands is wrapped, not cut."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, found.get_short_help_str(WHOLE)) for name, found in commands if found and not found.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
