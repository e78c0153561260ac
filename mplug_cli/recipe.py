"""``mplug recipe``: list, read, copy and check recipes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import completion, show
from mplug_cli.groups import Group
from mplug_cli.options import Quiet
from mplug_cli.streams import read_input, write_line, write_text
from mplug_core.bounded import MAX_YAML
from mplug_core.errors import LINE, MplugError, RecipeError, UsageError, shortened, values_without_secrets
from mplug_core.outputs import output_file

if TYPE_CHECKING:
    from mplug_core.recipe import Recipe

recipe = typer.Typer(name="recipe", cls=Group, help="List, read, copy and check recipes.", no_args_is_help=True)

_Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="A shipped recipe, with or without its folder, or a file.",
        autocompletion=completion.recipes,
    ),
]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Fields to change.")]


@recipe.callback()
def _group() -> None:
    """List, read, copy and check recipes."""


@recipe.command()
def ls(quiet: Quiet = False) -> None:
    """The shipped recipes, a line each."""
    from mplug_core.recipe import shipped_recipes

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0)
    for name, file in recipes.items():
        write_line(f"{name:{width}}  {_headline(file)}".rstrip())


def _headline(file: Path) -> str:
    """The first words of the comment on top of a recipe."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if text := line.lstrip("#").strip():
                return text if line.startswith("#") else ""
    return ""


@recipe.command("show")
def show_recipe(
    name: _Name,
    overrides: _Overrides = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Every field, defaults and overrides filled in.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Print a recipe: the file as it is, or with --resolved or overrides every field as a run would see it."""
    from mplug_core.recipe import find_recipe, load_recipe

    if resolved or overrides:
        write_text(as_yaml(load_recipe(name, overrides or [])))
    else:
        write_text(find_recipe(name).read_text(encoding="utf-8").rstrip("\n"))


def as_yaml(values: Recipe) -> str:
    """All fields of a recipe as a YAML document."""
    import yaml

    plain = values_without_secrets(values.model_dump(mode="json"))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120).rstrip("\n")


@recipe.command("cp")
def copy(
    name: _Name,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A file, or a folder to put it in.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the file if it exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """Copy a recipe, to change it."""
    from mplug_core.recipe import find_recipe

    source = find_recipe(name)
    if os.path.isdir(target):
        target = target / source.name
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target} would not be found as a recipe", f"call it {target}.yaml")
    if os.path.lexists(target) and not force:
        raise MplugError(f"{target} exists", "--force replaces it")
    text = source.read_bytes()
    with output_file(target, "TARGET", {"the recipe itself": source}) as out:
        out.write(text)
    write_line(str(target))


@recipe.command()
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|FILE|-... [KEY.PATH=VALUE]...",
            help="Recipes (- is standard input), and fields to change in each.",
            autocompletion=completion.recipes,
        ),
    ],
    quiet: Quiet = False,
) -> None:
    """Check recipes, and name all faults of each; the exit code is 3 if there are any."""
    from mplug_core.recipe import load_recipe, load_recipe_text

    names = [name for name in recipes if "=" not in name]
    if not names:
        raise UsageError("no recipe is named", "mplug recipe validate NAME|FILE")
    if names.count("-") > 1:
        raise UsageError("standard input is one recipe, and - is named twice", "name it once")
    overrides = [override for override in recipes if "=" in override]
    faulty = False
    for name in names:
        shown = "standard input" if name == "-" else name
        try:
            if name == "-":
                load_recipe_text(read_input("a recipe", MAX_YAML), shown, overrides)
            else:
                load_recipe(name, overrides)
            write_line(f"{shown}: ok")
        except RecipeError as error:
            sys.stdout.flush()
            told = str(error)
            if all(fault in told for fault in error.faults):
                show.error(told)
            else:
                for number, fault in enumerate(error.faults, 1):
                    place = f"{shortened(shown, 80)}: fault {number} of {len(error.faults)}"
                    show.error(shortened(f"{place}: {fault}", LINE))
            faulty = True
    if faulty:
        raise typer.Exit(RecipeError.exit_code)
