"""What people see beside the results: errors, notes and progress, all on stderr.

Colours and bars only where stderr is a terminal; ``NO_COLOR`` is honoured (by rich). rich is loaded when a terminal
needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ANNOUNCED_BYTES = 20 << 20
"""Files from this size on are announced where there is no terminal for a bar."""


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def error(message: str) -> None:
    """``error: MESSAGE``, in one line."""
    _line("error", "bold red", message)


def note(message: str, quiet: bool = False) -> None:
    """``note: MESSAGE``, in one line, unless ``quiet``."""
    if not quiet:
        _line("note", "cyan", message)


def warning(message: str, quiet: bool = False) -> None:
    """``warning: MESSAGE``, in one line, unless ``quiet``."""
    if not quiet:
        _line("warning", "yellow", message)


def printable(text: str) -> str:
    """``text`` with what would move the cursor or colour the terminal made visible."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def line(text: str) -> None:
    """Plain text, in one line."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def _line(label: str, style: str, message: str) -> None:
    if sys.stderr is None:  # closed by whoever started us
        return
    message = printable(message)
    if not on_terminal():
        print(f"{label}: {message}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble((f"{label}:", style), f" {message}"), soft_wrap=True)


@contextmanager
def progress(what: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar while the block runs; call what it gives with the number of things done since.

    No bar when stdout is the same terminal: its lines would run through the bar.
    """
    if quiet or not on_terminal() or (sys.stdout is not None and sys.stdout.isatty()):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def downloads(quiet: bool = False) -> Iterator[None]:
    """While the block runs, models that are downloaded get a bar a file; without a terminal one line a large file."""
    if quiet:
        yield
        return
    from mplug_core.weights.hub import reported

    if not on_terminal():
        with reported(_Announced()):
            yield
        return
    bars = _Bars()
    try:
        with reported(bars):
            yield
    finally:
        bars.stop()


class _Announced:
    """Says once of each file that it is downloaded, if that takes time."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what not in self.seen and (total is None or total >= ANNOUNCED_BYTES):
            note(f"downloading {what}" + (f", {total / 1e9:.2f} GB" if total else ""))
        self.seen.add(what)


class _Bars:
    """A bar for each file; rich is loaded when the first bytes are there."""

    def __init__(self) -> None:
        self.display: Any = None
        self.bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if self.display is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.progress import TransferSpeedColumn as Speed

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), Speed())
            self.display = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self.display.start()
        if what not in self.bars:
            self.bars[what] = self.display.add_task(printable(what), total=total)
        self.display.update(self.bars[what], completed=done, total=total)

    def stop(self) -> None:
        if self.display is not None:
            self.display.stop()
