"""``mplug runs``: what run folders tell, while a run goes on and after it."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import pages, show
from mplug_cli.groups import Group
from mplug_cli.options import Quiet
from mplug_cli.streams import json_line, write_bytes, write_line
from mplug_core.errors import MplugError, UsageError
from mplug_core.outputs import Output, output_file

if TYPE_CHECKING:
    from mplug_cli.pages import Table
    from mplug_core.training.history import Curve, Run

runs = typer.Typer(name="runs", cls=Group, help="Look at runs: curves, checkpoints, state.", no_args_is_help=True)

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
LISTED_FIGURES = 500
"""Lines of a log that are enough for a line of ``ls``."""


@runs.callback()
def _group() -> None:
    """Look at runs: curves, checkpoints, state."""


@runs.command()
def ls(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the run folders are.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines.")] = False,
    quiet: Quiet = False,
) -> None:
    """The runs in a folder, a line each: state, step, last loss, best score."""
    from mplug_core.training.history import find_runs, read_run

    found = find_runs(folder)
    rows = []
    for path in found:
        try:
            run = read_run(path, LISTED_FIGURES)
        except MplugError as error:
            show.warning(str(error), quiet)
            continue
        if as_json:
            write_line(json_line(as_object(run)))
        else:
            rows.append(_row(run))
    if not found:
        show.note(f"no runs in {folder}", quiet)
    for line in aligned(rows):
        write_line(line)


@runs.command("show")
def show_runs(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders; several are compared.")],
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the curves; - is stdout.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with curves and tables; - is stdout.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, a run each.")] = False,
    quiet: Quiet = False,
) -> None:
    """What runs did and where they are: figures, evaluations, checkpoints; as text, picture, page or JSON."""
    from mplug_core.training.history import read_run

    if sum((str(png) == "-", str(html) == "-", as_json)) > 1:
        raise UsageError("only one thing can go to standard output", "name a file for the others")
    named = names_of(folders)
    with (
        _output(png, "--png", named, html) as picture,
        _output(html, "--html", named, None) as page,
    ):
        _show({name: read_run(folder) for name, folder in named.items()}, picture, page, as_json, quiet)
    for file in (png, html):
        if file is not None and str(file) != "-" and not as_json:
            write_line(str(file))


def _show(
    chosen: dict[str, Run], picture: Output | None, page: Output | None, as_json: bool, quiet: bool
) -> None:
    """Runs as text or JSON, or as a picture and a page."""
    for run in chosen.values():
        if run.log.unreadable:
            show.note(f"{run.folder / 'metrics.jsonl'}: {_lines_left_out(run)}", quiet)
    if as_json:
        for run in chosen.values():
            write_line(json_line(as_object(run)))
    if picture is not None or page is not None:
        curves = _import_curves()
        if picture is not None:
            picture.write(pages.png(curves.draw(chosen)))
        if page is not None:
            page.write(curves.page(", ".join(chosen), chosen, sections(chosen)).encode("utf-8", "replace"))
    elif not as_json:
        for line in summary(chosen):
            write_line(line)


def names_of(folders: list[Path]) -> dict[str, Path]:
    """Run folders by what tells them apart: their own names, or their paths where those are the same."""
    distinct = list(dict.fromkeys(folders))
    short = [os.path.basename(os.path.realpath(folder)) for folder in distinct]
    unique = len(set(short)) == len(short)
    return {show.printable(name if unique else str(path)): path for name, path in zip(short, distinct, strict=True)}


def _import_curves() -> Any:
    try:
        import matplotlib  # noqa: F401

        from mplug_cli import curves
    except ImportError as error:
        raise MplugError(f"matplotlib can't be imported: {error}", "pip install matplotlib") from error
    return curves


_BEGINNINGS = {"--png": b"\x89PNG", "--html": b"<!DOCTYPE html>"}


@contextmanager
def _standard_output() -> Iterator[Output]:
    content = io.BytesIO()
    yield Output(Path("standard output"), content)
    write_bytes(content.getvalue())


def _output(
    file: Path | None, option: str, runs: dict[str, Path], other: Path | None
) -> AbstractContextManager[Output | None]:
    """The file that an option names, or standard output; in a run folder it may replace what such an option wrote."""
    if str(file) == "-":
        return _standard_output()

    def replaces(file: Path) -> bool:
        with open(file, "rb") as stream:
            return stream.read(len(_BEGINNINGS[option])) == _BEGINNINGS[option]

    inputs = {f"run {name}": folder for name, folder in runs.items()}
    return output_file(file, option, {**inputs, "--html": None if str(other) == "-" else other}, replaces)


def summary(chosen: dict[str, Run]) -> list[str]:
    """The text about one run, or the comparison of several."""
    lines: list[str] = []
    for heading, tables in sections(chosen):
        lines += [heading] if not lines else ["", heading]
        for caption, table in tables:
            head = [] if caption == "" else ["", caption]
            lines += [*head, *(f"  {line}" for line in aligned(table))]
    return [show.printable(line) for line in lines]


def sections(chosen: dict[str, Run]) -> list[tuple[str, list[tuple[str, Table]]]]:
    """(heading, its (caption, table)s): one a run, and for several the figures beside each other first."""
    if len(chosen) == 1:
        return [(f"{run.folder}", [("", _facts(run)), *_tables(run)]) for run in chosen.values()]
    figures = _comparison(chosen)
    return [
        ("runs", [("", [["run", "recipe", "state", "step", "loss", "best", "changed"], *map(_row, chosen.values())])]),
        *([("last figures", [("", figures)])] if len(figures) > 1 else []),
        *((f"{run.folder}", _tables(run)[-1:]) for run in chosen.values() if run.checkpoints),
    ]


def _facts(run: Run) -> Table:
    """What a run is and how far it came."""
    from mplug_core.training.figures import clock, counters

    last = run.log.last
    rows = [["recipe", run.recipe or "unknown"], ["state", f"{run.state}: {run.why}" if run.why else run.state]]
    if run.step is not None:
        rows.append(["step", _progress(run)])
    if isinstance(last.get("stage"), str):
        known = {"stage_step", "stage_steps"} <= set(last)
        of = f", step {last['stage_step']} of {last['stage_steps']}" if known else ""
        rows.append(["stage", f"{last['stage']}{of}"])
    if _finite(last.get("seconds")):
        left = last.get("eta_seconds") if run.state == "running" else None
        rows.append(["training time", clock(last["seconds"]) + (f", {clock(left)} left" if _finite(left) else "")])
    if run.changed is not None:
        rows.append(["last sign", f"{_age(run.changed)} ago"])
    if run.resumes:
        rows.append(["resumed at", _some(run.resumes)])
    for name, count in counters(last).items():
        steps = [step for step, _ in run.log.marks.get(name, [])]
        until = f" (by step {_some(steps)})" if steps else ""
        rows.append([name.replace("_", " "), f"{count}{until}"])
    if run.best:
        kept = ", kept in best/" if run.best["kept"] else ""
        rows.append(["best", f"{run.best['metric']} {run.best['value']:.4f} at step {run.best['step']}{kept}"])
    if run.log.unreadable or run.log.every > 1:
        rows.append(["log", _lines_left_out(run)])
    warnings = [event for event in run.events if event.get("event") == "warning"]
    rows += [["warning", f"step {event.get('step')}: {event.get('text')}"] for event in warnings[-5:]]
    return rows


def _lines_left_out(run: Run) -> str:
    """How much of a log was read."""
    log = run.log
    parts = [f"{log.lines} lines"]
    if log.every > 1:
        parts.append(f"1 in {log.every} read")
    if log.unreadable:
        parts.append(f"{log.unreadable} unreadable")
    return ", ".join(parts)


def _tables(run: Run) -> list[tuple[str, Table]]:
    """Figures, evaluations and checkpoints of a run, those that there are."""
    from mplug_cli.curves import figure_order

    tables: list[tuple[str, Table]] = []
    figures = {name: run.log.figures[name] for name in figure_order(run.log)}
    if figures:
        rows = [[name, *_course(curve)] for name, curve in figures.items()]
        tables.append(("figures", [["", "last", "lowest", "highest", "course"], *rows]))
    if run.log.evaluations:
        rows = [[name, *_course(curve), f"step {curve.steps[-1]}"] for name, curve in run.log.evaluations.items()
                if curve.steps]  # fmt: skip
        tables.append(("evaluations", [["", "last", "lowest", "highest", "course", "at"], *rows]))
    if run.checkpoints:
        rows = [
            [
                c.name + (" (latest)" if c.latest else "") + (" (best)" if c.step == run.best.get("step") else ""),
                _size(c.bytes),
                f"{_age(c.written)} ago",
                "?" if c.world is None else str(c.world),
                c.stage or "?",
                c.condition,
            ]
            for c in run.checkpoints
        ]
        tables.append(("checkpoints", [["", "size", "written", "processes", "stage", "condition"], *rows]))
    return tables


def _comparison(chosen: dict[str, Run]) -> Table:
    """A row a figure or metric, a column a run."""
    from mplug_cli.curves import figure_order

    rows: Table = [["", *chosen]]
    for kind, names in (
        ("figures", dict.fromkeys(name for run in chosen.values() for name in figure_order(run.log))),
        ("evaluations", dict.fromkeys(name for run in chosen.values() for name in run.log.evaluations)),
    ):
        for name in names:
            curves = [getattr(run.log, kind).get(name) for run in chosen.values()]
            rows.append([name, *(_short(c.values[-1]) if c and c.values else "-" for c in curves)])
    return rows


def _row(run: Run) -> list[str]:
    """A run in one line."""
    loss = run.log.figures.get("loss")
    best = f"{run.best['metric']} {run.best['value']:.4f}" if run.best else ""
    return [
        show.printable(str(run.folder)),
        show.printable(run.recipe or "?"),
        run.state,
        _progress(run) if run.step is not None else "no step",
        f"loss {_short(loss.values[-1])}" if loss and loss.values else "",
        show.printable(best),
        f"{_age(run.changed)} ago" if run.changed is not None else "",
    ]


def _progress(run: Run) -> str:
    return f"{run.step}/{run.steps} ({run.step / run.steps:.0%})" if run.steps else str(run.step)


def _course(curve: Curve) -> list[str]:
    """Last, lowest, highest, and the course in a few characters."""
    finite = [value for value in curve.values if math.isfinite(value)]
    edges = [_short(min(finite)), _short(max(finite))] if finite else ["-", "-"]
    return [_short(curve.values[-1]), *edges, sparkline(curve)]


def sparkline(curve: Curve, width: int = SPARK_WIDTH) -> str:
    """A curve as bars of one character; a gap where nothing is finite."""
    from mplug_core.training.history import thin

    means = thin(curve, width).means
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return ""
    largest = max(map(abs, finite)) or 1.0  # the difference of values may be more than a number holds
    low = min(finite) / largest
    span = max(finite) / largest - low
    if span <= 1e-9:  # the means of equal values differ by rounding
        span = 0.0

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return SPARKS[round((value / largest - low) / span * (len(SPARKS) - 1))] if span > 0 else SPARKS[0]

    return "".join(map(bar, means))


def aligned(rows: Table) -> list[str]:
    """Rows with their columns below each other."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts if i < len(row)) for i in range(max(map(len, texts), default=0))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in texts]


def as_object(run: Run) -> dict[str, Any]:
    """A run for ``--json``."""
    log = run.log
    values = {
        "folder": str(run.folder),
        "recipe": run.recipe,
        "state": run.state,
        "why": run.why,
        "step": run.step,
        "steps": run.steps,
        "last": log.last,
        "evaluations": {
            name: {"value": curve.values[-1], "step": curve.steps[-1]}
            for name, curve in log.evaluations.items()
            if curve.steps
        },
        "best": run.best or None,
        "resumes": run.resumes,
        "rises": {name: [list(mark) for mark in marks] for name, marks in log.marks.items()},
        "checkpoints": [
            {
                "name": c.name, "step": c.step, "bytes": c.bytes, "written": c.written, "processes": c.world,
                "stage": c.stage, "condition": c.condition, "latest": c.latest,
            }
            for c in run.checkpoints
        ],
        "lines": log.lines,
        "unreadable": log.unreadable,
        "changed": run.changed,
    }  # fmt: skip
    return values


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _some(steps: list[int]) -> str:
    """The last few of many steps."""
    shown = ", ".join(map(str, steps[-8:]))
    return f"…, {shown}" if len(steps) > 8 else shown


def _size(count: int) -> str:
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:.0f} {units[0]}"


def _age(moment: float) -> str:
    from mplug_core.training.history import ago

    return ago(max(time.time() - moment, 0.0))
