"""``mplug model pull`` and ``ls``: models by name, downloaded, and where they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import completion, options, show
from mplug_cli.streams import json_line, write_line
from mplug_core.errors import SOME_INPUTS_FAILED, CheckpointError

if TYPE_CHECKING:
    from mplug_core.weights.registry import Released


def pull(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="hf:org/name[@revision], ms:org/name[@revision], https://host/file.pth[#sha256=HEX], or a short name "
            "(mplug model ls).",
            autocompletion=completion.models,
        ),
    ],
    offline: Annotated[
        bool, typer.Option("--offline", help="Only look into the cache. MPLUG_OFFLINE=1 says so to every command.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Download models, or bring them up to date, and print where they are, a line each."""
    from mplug_core.weights import hub

    faults: list[CheckpointError] = []
    for name in names:
        try:
            with show.downloads(quiet):
                path = hub.pull(name, offline)
        except CheckpointError as error:
            if len(names) == 1:
                raise
            show.error(str(error))
            faults.append(error)
            continue
        write_line(str(path))
        show.note(f"cache: {_kept_in(path)}", quiet)
    if faults:
        raise typer.Exit(CheckpointError.exit_code if len(faults) == len(names) else SOME_INPUTS_FAILED)


def _kept_in(path: Path) -> Path:
    """The cache that a model is in: ours, or else the folder of its repository in that of Hugging Face."""
    from mplug_core.weights.cache import home

    if path.is_relative_to(home()):
        return home()
    return next((parent.parent for parent in path.parents if parent.name.startswith("models--")), path.parent)


def ls(
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, with everything that is known.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """The released models that have short names, and which are on this machine.

    Nothing is asked of a server: sizes are what the architecture takes, and addresses may have changed.
    """
    from mplug_cli.runs import aligned
    from mplug_core.weights.cache import home
    from mplug_core.weights.hub import cached
    from mplug_core.weights.registry import RELEASED

    found = {name: cached(name) for name in RELEASED}
    if as_json:
        for name, released in RELEASED.items():
            write_line(json_line(_as_object(released, found[name])))
    else:
        rows = [["name", "task", "parameters", "size", "pixels", "here", "source"]]
        rows += [_row(released, found[name]) for name, released in RELEASED.items()]
        for line in aligned(rows):
            write_line(line)
    show.note(f"licence of the weights: {next(iter(RELEASED.values())).licence}", quiet)
    show.note(f"cache: {home()}", quiet)


def _row(released: Released, path: Path | None) -> list[str]:
    return [
        released.name,
        released.task,
        f"{released.parameters / 1e6:.0f}M" if released.parameters else "unknown",
        f"about {released.about_bytes / 1e9:.1f} GB" if released.about_bytes else "unknown",
        str(released.image_size or "unknown"),
        "yes" if path else "no",
        " or ".join(released.sources),
    ]


def _as_object(released: Released, path: Path | None) -> dict[str, object]:
    """A released model for ``--json``: ``path`` is null where it isn't on this machine."""
    from mplug_core.weights.hub import sources

    return {
        "name": released.name,
        "task": released.task,
        "parameters": released.parameters,
        "about_bytes": released.about_bytes,
        "image_size": released.image_size,
        "licence": released.licence,
        "sources": list(released.sources),
        "path": None if path is None else str(path),
        "places": [str(source.place) for source in sources(released.name)],
    }
