"""What all benchmarks have in common: their options, their progress, and how their report is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import completion, show
from mplug_cli.streams import is_terminal, write_line
from mplug_core.device import check_device, choose_device
from mplug_core.errors import MplugError, UsageError
from mplug_core.outputs import Output, output_file
from mplug_core.recipe import named_size, nearest

if TYPE_CHECKING:
    from mplug_core.bench.measure import Report

Size = Annotated[
    str,
    typer.Option(
        "--size",
        metavar="NAME",
        help="Of the model: tiny, small, base or large.",
        autocompletion=completion.sizes,
    ),
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Times that each is measured, in turns; medians count.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of PyTorch. Default: as many as it takes by itself.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object with every figure.")]
Markdown = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write the report there, too, as Markdown.")
]


def check_size(size: str) -> None:
    """UsageError unless it is a named size; answers without torch."""
    try:
        named_size(size)
    except MplugError as error:
        raise UsageError(error.message, error.hint) from error


def chosen(against: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """What to measure against: each once, all that are ``known`` if none is named. UsageError for another."""
    for name in against or ():
        if name not in known:
            raise UsageError(f"--against {name}: not known{nearest(name, known)}", f"one of {', '.join(known)}")
    return list(dict.fromkeys(against or known))


@contextmanager
def measuring(
    what: str, turns: int | None, device: str | None, threads: int | None, quiet: bool = False
) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The device, and what to call with a name after each of ``turns``: a bar on a terminal, else a line in all."""
    check_device(device)
    device = choose_device(device)
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    if not show.on_terminal():
        show.note(f"measuring {what}" + (f", {turns} turns" if turns else ""), quiet)
    try:
        with show.progress(what, turns, quiet) as advance:
            yield device, lambda name: advance(1)
    finally:
        torch.set_num_threads(before)


def markdown_file(file: Path | None, **inputs: str | Path | None) -> AbstractContextManager[Output | None]:
    """The file that ``--markdown`` names; ``inputs`` are paths that the command reads, by their options."""
    return output_file(file, "--markdown", {f"--{name}": path for name, path in inputs.items()}, _is_report)


def _is_report(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(4) == b"### "


def show_report(report: Report, as_json: bool, markdown: Output | None) -> None:
    """The report on stdout, and in the file ``markdown``."""
    if as_json:
        write_line(report.json())
    else:
        _show_table(report)
    if markdown is not None:
        markdown.write(report.markdown())


def _show_table(report: Report) -> None:
    """Title, table, notes and machine: drawn on a terminal, else in aligned columns."""
    import sys

    from mplug_cli.runs import aligned

    notes = [*report.notes, str(report.machine)]
    if is_terminal(sys.stdout):
        from rich.console import Console

        table = show.table(report.columns, title=report.title, title_justify="left")
        for row in report.rows:
            table.add_row(*show.cells(row))
        console = Console()
        console.print(table)
        for note in notes:
            console.print(f"- {show.printable(note)}", markup=False, highlight=False)
        return
    for line in [report.title, "", *aligned([report.columns, *report.rows]), "", *(f"- {note}" for note in notes)]:
        write_line(line)
