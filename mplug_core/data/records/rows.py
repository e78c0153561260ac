"""Rows of CSV and TSV after RFC 4180: fields in quotes may have separators, doubled quotes and line breaks.

Python's csv module has one limit for all readers of a process, and takes a carriage return in a text for damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_ROW = 1 << 20
"""Characters of a row, with all of its fields."""
MAX_ROW_LINES = 1000


class Row(NamedTuple):
    """The fields of a row, from the line ``where``; of one that is none, ``fault`` says why, and ``line`` is its first
    line as it stands."""

    where: str
    fields: list[str]
    line: str
    fault: str = ""


@dataclass
class _Open:
    """A row of which a field in quotes goes on in the next line."""

    fields: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    length: int = 0


class _NoRow(ValueError):
    pass


def rows(lines: Iterable[tuple[str, str]], separator: str) -> Iterator[Row]:
    """The rows of lines (place, text without its end).

    A quote that is not closed, or that something follows, makes a fault of its line alone: the lines after it are read
    as if it had not been.
    """
    source = iter(lines)
    again: list[tuple[str, str]] = []  # lines that a row which was none had taken, the next one last

    def following() -> tuple[str, str] | None:
        return again.pop() if again else next(source, None)

    while (first := following()) is not None:
        where, text = first
        taken, state, now = [], _Open(), text
        try:
            while not _feed(state, now, separator):
                more = following() if len(taken) < MAX_ROW_LINES and state.length <= MAX_ROW else None
                if more is None:
                    raise _NoRow("a quote is opened and not closed")
                taken.append(more)
                now = more[1]
            if state.length > MAX_ROW:
                raise _NoRow(f"a row of more than {MAX_ROW >> 20} MB")
        except _NoRow as error:
            again += reversed(taken)
            yield Row(where, [], text, str(error))
            continue
        yield Row(where, state.fields, text)


def _feed(state: _Open, text: str, separator: str) -> bool:
    """Take one more line; whether the row ends with it."""
    state.length += len(text) + 1
    place, inside = 0, bool(state.begun)
    while True:
        if inside or text.startswith('"', place):
            if not inside:
                place += 1
            end = _closing(text, place)
            if separator == "\t" and state.begun and separator in text[place : len(text) if end < 0 else end]:
                # a tab in the next line: a row of its own, and the quote is that of somebody who is quoted
                raise _NoRow("a quote is opened and not closed")
            if end < 0:
                state.begun.append(text[place:].replace('""', '"'))
                return False
            # a field over several lines is one text
            state.fields.append("\n".join([*state.begun, text[place:end].replace('""', '"')]))
            state.begun, inside, place = [], False, end + 1
            if place == len(text):
                return True
            if text[place] != separator:
                raise _NoRow(f"a quote is followed by {text[place]!r}")
        else:
            end = text.find(separator, place)
            state.fields.append(text[place:] if end < 0 else text[place:end])
            if end < 0:
                return True
            place = end
        place += 1


def _closing(text: str, place: int) -> int:
    """Where a field in quotes ends; -1 where it doesn't in this line."""
    while (end := text.find('"', place)) >= 0:
        if not text.startswith('""', end):
            return end
        place = end + 2
    return -1


def one_line(text: str) -> str:
    """A text on one line: a caption is one, whatever its file breaks it with."""
    return " ".join(text.split())


_URL = re.compile(r"\s*[a-zA-Z][a-zA-Z0-9+.-]*://\S.*", re.DOTALL)  # people write spaces in them
_IMAGES, _TEXTS = ("image", "url", "filepath"), ("caption", "text", "title")


class Pair(NamedTuple):
    """An image, by its path or address, and its caption; of a line that has none, ``fault`` says why."""

    where: str
    image: str
    caption: str
    fault: str = ""


def is_address(text: str) -> bool:
    """Whether a field is a URL of any scheme."""
    return _URL.fullmatch(text) is not None


def image_pairs(lines: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    """The pairs of a TSV, in either order where one is a URL, or as a header names its columns.

    A line whose quotes are none of RFC 4180's, such as those of somebody who is quoted, is taken as it stands.
    """
    columns: tuple[int, int] | None = None
    width, first = 2, True
    for row in rows(lines, "\t"):
        cells = row.line.split("\t") if row.fault else row.fields
        if first and (columns := _header(cells)):
            first, width = False, len(cells)
            continue
        first = False
        if row.fault and len(cells) != width:
            yield Pair(row.where, "", "", f"expected balanced quotes: {row.fault}")
        elif len(cells) < 2 or (columns and max(columns) >= len(cells)):
            yield Pair(row.where, "", "", f"expected two columns, got {len(cells)}")
        elif columns:
            yield Pair(row.where, cells[columns[0]], one_line(cells[columns[1]]))
        elif is_address(cells[1]) and not is_address(cells[0]):  # as CC3M has them
            yield Pair(row.where, cells[1], one_line(cells[0]))
        else:
            yield Pair(row.where, cells[0], one_line(cells[1]))


def _header(cells: list[str]) -> tuple[int, int] | None:
    names = [cell.strip().lower() for cell in cells]
    image = next((names.index(name) for name in _IMAGES if name in names), None)
    text = next((names.index(name) for name in _TEXTS if name in names), None)
    return None if image is None or text is None else (image, text)
