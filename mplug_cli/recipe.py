"""``mplug recipe``: list, read, copy and check recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import show
from mplug_cli.streams import write_line
from mplug_core.errors import MplugError, RecipeError, UsageError

if TYPE_CHECKING:
    from mplug_core.recipe import Recipe

recipe = typer.Typer(name="recipe", help="List, read, copy and check recipes.", no_args_is_help=True)

_Name = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A shipped recipe, with or without its folder, or a file.")
]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Fields to change.")]


@recipe.callback()
def _group() -> None:
    """List, read, copy and check recipes."""


@recipe.command()
def ls() -> None:
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
) -> None:
    """Print a recipe: the file as it is, or with --resolved or overrides every field as a run would see it."""
    from mplug_core.recipe import find_recipe, load_recipe

    if resolved or overrides:
        write_line(as_yaml(load_recipe(name, overrides or [])))
    else:
        write_line(find_recipe(name).read_text(encoding="utf-8").rstrip("\n"))


def as_yaml(values: Recipe) -> str:
    """All fields of a recipe as a YAML document."""
    import yaml

    return yaml.safe_dump(values.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120).rstrip("\n")


@recipe.command("cp")
def copy(
    name: _Name,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A file, or a folder to put it in.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from mplug_core.recipe import find_recipe

    source = find_recipe(name)
    if target.is_dir():
        target = target / source.name
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target} would not be found as a recipe", f"call it {target}.yaml")
    try:
        text = source.read_bytes()
        with open(target, "wb" if force else "xb") as file:
            file.write(text)
    except FileExistsError as error:
        raise MplugError(f"{target} exists", "--force replaces it") from error
    except OSError as error:
        raise MplugError(f"{target} can't be written: {error.strerror}", "check the folder") from error
    write_line(str(target))


@recipe.command()
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="NAME|FILE... [KEY.PATH=VALUE]...", help="Recipes, and fields to change in each."),
    ],
) -> None:
    """Check recipes, and name all faults of each; the exit code is 3 if there are any."""
    from mplug_core.recipe import load_recipe

    names = [name for name in recipes if "=" not in name]
    if not names:
        raise UsageError("no recipe is named", "mplug recipe validate NAME|FILE")
    faulty = False
    for name in names:
        try:
            load_recipe(name, [override for override in recipes if "=" in override])
            write_line(f"{name}: ok")
        except RecipeError as error:
            sys.stdout.flush()
            show.error(str(error))
            faulty = True
    if faulty:
        raise typer.Exit(RecipeError.exit_code)
