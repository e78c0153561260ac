"""What a training run shows on stderr: a live display on a terminal, one line an interval elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mplug_cli import show
from mplug_core.training.figures import clock, counters, is_number, loss_figures

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live

    from mplug_core.training.loop import Watch

# figures beside the losses, as they are written: (name, text with the value in it)
RATES = (
    ("lr", "lr {:.2e}"),
    ("visual_lr", "visual lr {:.2e}"),
    ("grad_norm", "grad {:.2f}"),
    ("images_per_second", "{:.1f} img/s"),
    ("tokens_per_second", "{:.0f} tok/s"),
    ("mfu", "MFU {:.1%}"),
    ("memory_gb", "{:.1f} GB"),
)

LINE_SECONDS = 30
"""Between two lines on how far the features are, where no bar can be drawn."""


@contextmanager
def watching(quiet: bool = False) -> Iterator[Watch]:
    """A :data:`Watch` for :func:`mplug_core.training.trainer.train`."""
    if quiet or not show.on_terminal():
        yield Lines(quiet)
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_dumb_terminal:  # it can't go back up
        yield Lines()
        return
    from rich.live import Live

    # drawn when there is something new, and never in between
    with Live(console=console, auto_refresh=False) as live:
        yield LiveDisplay(live)


class Lines:
    """One line an event; of how far the features are, which is told every second, one now and then."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.next = 0.0

    def __call__(self, kind: str, figures: dict[str, Any]) -> None:
        if kind == "features":
            now = figures["seconds"]
            if now < self.next and figures["done"] < figures["total"]:
                return
            self.next = 0.0 if figures["done"] == figures["total"] else now + LINE_SECONDS
        plain(kind, figures, self.quiet)


def plain(kind: str, figures: dict[str, Any], quiet: bool = False) -> None:
    """One line an event."""
    if quiet:
        return
    if kind == "note":
        note = show.warning if figures.get("level") == "warning" else show.note
        note(str(figures["text"]))
    elif kind == "start":
        show.note(f"stage {figures['stage']}: steps {figures['step']} to {figures['steps']}")
    elif kind == "features":
        done = f"features of {figures['of']} {figures['done']}/{figures['total']}"
        show.line("  ".join((done, *rate_cells(figures))))
    elif kind == "step":
        show.line("  ".join((place(figures), *loss_cells(figures), *rate_cells(figures), *count_cells(figures))))
    elif kind == "evaluation":
        for name, value in figures["evaluation"].items():
            show.line(f"{name}  {value:.4f}")
    elif kind == "scores":
        for row in score_rows(figures):
            show.line("  ".join(f"{cell:<{width}}" for cell, width in zip(row, (36, 16, 16), strict=False)).rstrip())
    elif kind == "end":
        show.note(f"done after {clock(figures['seconds'])}: {figures['folder']}")


def place(figures: dict[str, Any]) -> str:
    """``train 20/400``: the stage and where in it."""
    return f"{figures.get('stage', 'train')} {figures.get('stage_step', '?')}/{figures.get('stage_steps', '?')}"


def loss_cells(figures: dict[str, Any]) -> list[str]:
    """``itc 1.234`` for each loss."""
    return [f"{name} {value:.3f}" for name, value in loss_figures(figures).items()]


def rate_cells(figures: dict[str, Any]) -> list[str]:
    """Rates, speed and memory, as far as they are known, and the time that is left."""
    same = figures.get("visual_lr") == figures.get("lr")
    names = {name: text for name, text in RATES if is_number(figures.get(name)) and not (same and name == "visual_lr")}
    cells = [text.format(figures[name]) for name, text in names.items()]
    left = seconds_left(figures)
    return [*cells, f"{clock(left)} left"] if left is not None else cells


def count_cells(figures: dict[str, Any]) -> list[str]:
    """``3 bad images`` for each counter that isn't zero."""
    return [f"{value} {name.replace('_', ' ')}" for name, value in counters(figures).items()]


def seconds_left(figures: dict[str, Any]) -> float | None:
    """Until the end, or the end of the stage where only that can be guessed; None where nothing can."""
    left = figures.get("eta_seconds")
    if left is None and all(is_number(figures.get(name)) for name in ("stage_steps", "stage_step", "seconds", "step")):
        left = (figures["stage_steps"] - figures["stage_step"]) * figures["seconds"] / max(figures["step"], 1)
    return left if is_number(left) and 0 <= left < 1e9 else None


class LiveDisplay:
    """Losses, rates and progress in place; notes and evaluations scroll above."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.steps: int | None = None

    def __call__(self, kind: str, figures: dict[str, Any]) -> None:
        if kind == "begin":
            self.steps = figures.get("steps")
        elif kind == "features":
            from rich.console import Group

            bar = Bar(f"features of {figures['of']}", figures["done"], figures["total"])
            self.live.update(Group(bar, Cells(rate_cells(figures), "")), refresh=True)
        elif kind == "scenes":
            self.live.update(Bar("scenes", figures["done"], figures["total"]), refresh=True)
        elif kind == "step":
            self.live.update(self.panel(figures), refresh=True)
        elif kind == "evaluation":
            metrics = "  ".join(f"{name} {value:.3f}" for name, value in figures["evaluation"].items())
            if metrics:
                self.above(f"step {figures['step']}: {metrics}")
        elif kind == "note":
            warning = figures.get("level") == "warning"
            self.above(str(figures["text"]), *(("warning", "yellow") if warning else ("note", "cyan")))
        elif kind == "scores":
            self.live.console.print(score_table(figures))
        elif kind == "end":
            self.above(f"done after {clock(figures['seconds'])}: {figures['folder']}")

    def above(self, text: str, label: str = "", style: str = "") -> None:
        """A line that scrolls up, out of the way of what is drawn in place."""
        from rich.text import Text

        text = show.printable(text)
        self.live.console.print(Text.assemble((f"{label}: ", style), text) if label else Text(text), soft_wrap=True)

    def panel(self, figures: dict[str, Any]) -> RenderableType:
        """Progress of the stage and of the run, losses, rates and counters, as the width allows."""
        from rich.console import Group

        done, steps, total = figures.get("stage_step"), figures.get("stage_steps"), figures.get("step")
        lines: list[RenderableType] = []
        if is_number(done) and is_number(steps):
            lines.append(Bar(str(figures.get("stage", "train")), done, steps))
        if self.steps and is_number(total) and self.steps != steps:
            lines.append(Bar("run", total, self.steps))
        lines.append(Cells(loss_cells(figures), "bold"))
        lines.append(Cells(rate_cells(figures), ""))
        if counted := count_cells(figures):
            lines.append(Cells(counted, "yellow"))
        return Group(*lines)


class Bar:
    """``train ━━━━━━━━ 120/400 30%``; the bar takes what the words leave."""

    def __init__(self, name: str, done: int, steps: int) -> None:
        self.name, self.done, self.steps = show.printable(name), done, steps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        words = f"{self.done}/{self.steps}  {self.done / max(self.steps, 1):.0%}"
        space = options.max_width - len(self.name) - len(words) - 4
        if space < 5:
            yield Text(f"{self.name} {words}", no_wrap=True, overflow="ellipsis")
            return
        row = Table.grid(padding=(0, 2))
        row.add_row(
            Text(self.name, "bold"),
            ProgressBar(total=self.steps, completed=self.done, width=min(space, 40)),
            Text(words),
        )
        yield row


class Cells:
    """Short texts beside each other, over as many lines as the width makes necessary; none is broken."""

    def __init__(self, cells: list[str], style: str) -> None:
        self.cells, self.style = cells, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        line = ""
        for cell in self.cells:
            joined = f"{line}  {cell}" if line else cell
            if line and len(joined) > options.max_width:
                yield Text(show.printable(line), self.style, no_wrap=True, overflow="ellipsis")
                joined = cell
            line = joined
        if line:
            yield Text(show.printable(line), self.style, no_wrap=True, overflow="ellipsis")


def score_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table at the end: a head, then each metric at the last step and, where a best is kept, at the best."""
    columns = [name for name in ("last", "best") if figures[name]]
    head = ("metric", *(f"{name}, step {figures['at'][name]}" for name in columns))
    values = {metric: [figures[name].get(metric) for name in columns] for metric in figures["last"]}
    return [head] + [(metric, *("-" if v is None else f"{v:.4f}" for v in row)) for metric, row in values.items()]


def score_table(figures: dict[str, Any]) -> Any:
    """The same for a terminal."""
    head, *rows = score_rows(figures)
    table = show.table(head)
    for row in rows:
        table.add_row(*show.cells(row))
    return table
