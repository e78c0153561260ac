"""What a training run shows on stderr: a live display on a terminal, one line an interval elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mplug_cli import show

if TYPE_CHECKING:
    from mplug_core.training.loop import Watch

# of the figures of a step, those that are not losses
OTHER = frozenset(
    ("stage", "step", "stage_step", "stage_steps", "grad_norm", "lr", "images_per_second", "seconds")
)  # fmt: skip


@contextmanager
def watching(quiet: bool = False) -> Iterator[Watch]:
    """A :data:`Watch` for :func:`mplug_core.training.trainer.train`."""
    if show.on_terminal() and not quiet:
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(stderr=True), auto_refresh=False) as live:
            yield LiveDisplay(live)
    else:
        yield lambda kind, figures: plain(kind, figures, quiet)


def plain(kind: str, figures: dict[str, Any], quiet: bool = False) -> None:
    """One line an event."""
    if kind == "note":
        show.note(figures["text"], quiet)
    elif quiet:
        return
    elif kind == "start":
        show.note(f"stage {figures['stage']}: steps {figures['step']} to {figures['steps']}")
    elif kind == "step":
        losses = "  ".join(f"{name} {value:.3f}" for name, value in loss_figures(figures).items())
        show.line(
            f"{figures['stage']} {figures['stage_step']}/{figures['stage_steps']}  {losses}  lr {figures['lr']:.2e}  "
            f"grad {figures['grad_norm']:.2f}  {figures['images_per_second']:.1f} img/s"
        )
    elif kind == "evaluation":
        for name, value in figures["evaluation"].items():
            show.line(f"{name}  {value:.4f}")
    elif kind == "scores":
        for row in score_rows(figures):
            show.line("  ".join(f"{cell:<{width}}" for cell, width in zip(row, (36, 16, 16), strict=False)).rstrip())
    elif kind == "end":
        show.note(f"done after {clock(figures['seconds'])}: {figures['folder']}")


class LiveDisplay:
    """Losses, rates and progress in place; notes and evaluations scroll above."""

    def __init__(self, live: Any) -> None:
        self.live = live

    def __call__(self, kind: str, figures: dict[str, Any]) -> None:
        if kind == "step":
            self.live.update(self.table(figures), refresh=True)
        elif kind == "evaluation":
            metrics = "  ".join(f"{name} {value:.3f}" for name, value in figures["evaluation"].items())
            if metrics:
                self.live.console.print(f"step {figures['step']}: {metrics}", highlight=False)
        elif kind == "note":
            self.live.console.print(f"note: {figures['text']}", highlight=False, markup=False)
        elif kind == "scores":
            self.live.console.print(score_table(figures))
        elif kind == "end":
            self.live.console.print(f"done after {clock(figures['seconds'])}: {figures['folder']}", highlight=False)

    def table(self, figures: dict[str, Any]) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        done, steps = figures["stage_step"], figures["stage_steps"]
        left = (steps - done) * figures["seconds"] / max(figures["step"], 1)
        table = Table.grid(padding=(0, 2))
        losses = loss_figures(figures)
        table.add_row(*losses)
        table.add_row(*(f"{value:.3f}" for value in losses.values()))
        head = (
            f"{figures['stage']}  step {done} of {steps}  lr {figures['lr']:.2e}  gradient {figures['grad_norm']:.2f}  "
            f"{figures['images_per_second']:.1f} img/s  {clock(left)} left"
        )
        return Group(head, ProgressBar(total=steps, completed=done, width=60), table)


def score_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table at the end: a head, then each metric at the last step and, where a best is kept, at the best."""
    columns = [name for name in ("last", "best") if figures[name]]
    head = ("metric", *(f"{name}, step {figures['at'][name]}" for name in columns))
    values = {metric: [figures[name].get(metric) for name in columns] for metric in figures["last"]}
    return [head] + [(metric, *("-" if v is None else f"{v:.4f}" for v in row)) for metric, row in values.items()]


def score_table(figures: dict[str, Any]) -> Any:
    """The same for a terminal."""
    from rich.table import Table

    head, *rows = score_rows(figures)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    return table


def loss_figures(figures: dict[str, Any]) -> dict[str, float]:
    """The losses among the figures of a step."""
    return {name: value for name, value in figures.items() if name not in OTHER and isinstance(value, float)}


def clock(seconds: float) -> str:
    """1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
