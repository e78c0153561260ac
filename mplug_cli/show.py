"""What people see beside the results: errors, notes and progress, all on stderr.

Colours and bars only where stderr is a terminal; ``NO_COLOR`` is honoured (by rich). rich is loaded when a terminal
needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
