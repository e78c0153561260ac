"""What people see beside the results: errors, notes and progress, all on stderr.

Colours and bars only where stderr is a terminal; ``NO_COLOR`` is honoured (by rich). rich is loaded when a terminal
needs it. :func:`printable` is what every text goes through that may reach a terminal. A stderr that can't be written
stops nothing.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mplug_core.errors import LINE, shortened, without_secrets

ANNOUNCED_BYTES = 20 << 20
"""Files from this size on are announced where there is no terminal for a bar."""


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


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


def printable(text: str, keep: str = "") -> str:
    """``text`` with what would move the cursor, colour the terminal or reorder the line as a visible escape: ``\\x1b``.

    These are the characters of control and format (but for the joiners, which scripts need), line and paragraph
    separators, and bytes that are no Unicode. ``keep`` are characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_hidden(c) else _escape(c) for c in text)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file's name
        number -= 0xDC00
    if number <= 0xFF:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def table(head: Iterable[str], **options: Any) -> Any:
    """An empty table of rich with these columns."""
    from rich.table import Table

    made = Table(**options)
    for cell in cells(head):
        made.add_column(cell)
    return made


def cells(row: Iterable[str]) -> list[Any]:
    """The cells of a row for a table of rich, which would take ``[red]`` for an order."""
    from rich.text import Text

    return [Text(printable(cell)) for cell in row]


def line(text: str) -> None:
    """Plain text, in one line."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # full, its reader gone, or closed: the work goes on
            print(printable(text), file=sys.stderr, flush=True)


def where_from() -> None:
    """The traceback of the error that is handled now."""
    for text in traceback.format_exc().splitlines():
        line(text)


def _line(label: str, style: str, message: str) -> None:
    if sys.stderr is None:  # closed by whoever started us
        return
    message = shortened(printable(without_secrets(message)), LINE - len(label) - 2)
    if not on_terminal():
        line(f"{label}: {message}")
        return
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((f"{label}:", style), f" {message}")
    with contextlib.suppress(OSError):
        Console(stderr=True).print(text, soft_wrap=True)


@contextmanager
def progress(
    what: str, total: int | None, quiet: bool = False, lines: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar while the block runs; call what it gives with the number of things done since.

    ``lines`` says that the block writes results: there is no bar then when stdout is a terminal, too, since its lines
    would run through the bar.
    """
    if quiet or not on_terminal() or (lines and sys.stdout is not None and sys.stdout.isatty()):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def evaluations(what: str, quiet: bool = False) -> Iterator[None]:
    """While the block runs, records that are evaluated get a bar."""
    if quiet or not on_terminal():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mplug_core.tasks.evaluation import reported

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        with reported(lambda done, total: bar.update(task, completed=done, total=total)):
            yield


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
