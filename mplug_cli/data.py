"""``mplug data``: make data sets and look into them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import completion, show
from mplug_cli.choices import check_choice
from mplug_cli.groups import Group
from mplug_cli.options import Quiet
from mplug_cli.pack import pack_data
from mplug_cli.streams import is_terminal, json_line, write_line
from mplug_core.errors import UsageError

if TYPE_CHECKING:
    from mplug_core.data.records.inspection import Inspection, TaskView

data = typer.Typer(name="data", cls=Group, help="Make data sets and look into them.", no_args_is_help=True)


@data.callback()
def _group() -> None:
    """Make data sets and look into them."""


data.command("pack")(pack_data)


@data.command()
def scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; a scenes folder there is replaced.")],
    n: Annotated[
        int, typer.Option("--n", min=1, help="Training scenes; val and held_out have a twentieth each.")
    ] = 10000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same scenes.")] = 0,
    size: Annotated[int, typer.Option("--size", min=32, max=1024, help="Pixels a side.")] = 96,
    world: Annotated[
        str,
        typer.Option(
            "--world",
            metavar="full|small",
            help="small: fewer shapes and colours, learned in minutes.",
            autocompletion=completion.one_of(("full", "small")),
        ),
    ] = "full",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; default: one a core.")] = None,
    quiet: Quiet = False,
) -> None:
    """Generate a small world: pictures with captions, questions, phrases, statements and entailment, all exact.

    Writes OUT/{train,val,held_out} with images and JSON Lines. held_out has colours and shapes together that train
    never has.
    """
    from mplug_core.data.scenes.folder import split_sizes, write_scenes
    from mplug_core.data.scenes.world import WORLDS

    check_choice("world", world, WORLDS)
    workers = workers or os.cpu_count() or 1
    with show.progress("scenes", sum(split_sizes(n).values()), quiet, lines=False) as advance:
        totals = write_scenes(out, n, seed, size, workers, WORLDS[world], progress=advance)
    for split, records in totals.items():
        counts = ", ".join(f"{number} {kind}" for kind, number in records.items() if kind != "captions")
        write_line(f"{out / split}: {counts}")


@data.command("inspect")
def inspect_data(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or folder of records.")],
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="caption, vqa, grounding, ... Default: all that PATH can serve.",
            autocompletion=completion.tasks,
        ),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Part of the data set. Default: all of them.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--format", help="The files' format. Default: what they look like.", autocompletion=completion.formats
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option("--images", metavar="DIR", help="The folder that image names are relative to.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Of a pack: compute every checksum.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show what is understood of a data set: tasks, format, splits, counts, what is missing or broken, examples.

    PATH may be a pack, also behind http, https or s3.
    """
    from mplug_core.data.records.inspection import inspect
    from mplug_core.data.records.types import FORMATS
    from mplug_core.data.shards.remote import locate

    formats = sorted({name for names in FORMATS.values() for name in names} | {"shards"})
    check_choice("task", task, FORMATS)
    check_choice("format", layout, formats)
    folder = locate(path, split, layout if layout == "shards" else None)
    if folder is not None:
        from mplug_core.data.shards.reading import Pack
        from mplug_core.data.shards.summary import inspect_pack

        if images is not None:
            raise UsageError("--images is for files of records, and a pack has its images", "leave it out")
        found = inspect_pack(Pack(folder), task, verify)
    elif verify:
        raise UsageError(f"{path} is no pack", "--verify is for packs")
    else:
        found = inspect(path, task, split, layout, images)
    if as_json:
        write_line(json_line(found.as_object()))
    else:
        _show_inspection(found)


def _show_inspection(found: Inspection) -> None:
    write_line(show.printable(found.path))
    for view in found.tasks:
        write_line("")
        write_line(f"task {view.task}")
        _show_splits(view)
        for name, text in _details(view):
            write_line(f"  {name:<10}{show.printable(text)}".rstrip())


def _show_splits(view: TaskView) -> None:
    """A line a split; a table where people look at it."""
    header = ("split", "format", "records", "usable", "images", "missing", "broken", "file")
    rows = [
        (s.split or "-", s.format, *(f"{n:,}" for n in (s.records, s.usable, s.images, s.missing, s.broken)), s.source)
        for s in view.splits
    ]
    rows = [tuple(map(show.printable, row)) for row in rows]
    if is_terminal(sys.stdout):
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
        for name in header:
            right = name in header[2:-1]
            table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name != "file")
        for row in rows:
            table.add_row(*show.cells(row))
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [f"{c:>{w}}" if 2 <= k < 7 else f"{c:<{w}}" for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        write_line("  " + "  ".join(cells).rstrip())


def _details(view: TaskView) -> list[tuple[str, str]]:
    """(name, text) of each line under the table; further lines of one name have an empty one."""
    words = view.words
    shown = [("words", f"{words['shortest']} to {words['longest']}, mean {words['mean']}")]
    if view.histogram:
        counts = ", ".join(f"{_short(value)} {number:,}" for value, number in view.histogram.items())
        more = view.distinct - len(view.histogram)
        what = {"questions": "answers", "phrases": "phrases", "captions": "domains"}.get(view.kind, "labels")
        shown.append((what, counts + (f" and {more:,} more" if more > 0 else "")))
    shown += _listed("missing", [image for split in view.splits for image in split.first_missing][:3])
    shown += _listed("broken", view.faults + [fault for split in view.splits for fault in split.first_broken][:5])
    return shown + _listed("examples", [_example(values) for values in view.examples])


def _example(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{name}={_short(value)}" for name, value in values.items() if name not in ("weights", "annotators")
    )


def _listed(name: str, texts: list[str]) -> list[tuple[str, str]]:
    return [(name if number == 0 else "", text) for number, text in enumerate(texts)]


def _short(value: Any) -> str:
    """A value on one line, and not longer than people want to read."""
    text = " ".join((", ".join(map(str, value)) if isinstance(value, list) else str(value)).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
