"""One file or folder of a data set: opened whether it is gzipped or not, and looked into to see what it is.

Whatever is wrong with a file as a whole is a DataError that names it; nothing that is in a file is executed.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from mplug_core.bounded import Unreadable, open_regular, read_up_to, size_shown
from mplug_core.data.records.pickled_refs import PICKLES, read_plain_pickle
from mplug_core.errors import DataError

Shape = Literal["folder", "pickle", "lines", "list", "object", "text"]

_HEAD = 1 << 16
_BOM = b"\xef\xbb\xbf"
DAMAGED = (OSError, EOFError, zlib.error)
"""What reading a damaged file raises; gzip.BadGzipFile is an OSError."""
MAX_PICKLED_RECORDS = 256 << 20
"""Bytes of a pickle of records: those of RefCOCO have 30 MB."""
MAX_LINE = 16 << 20
"""Bytes of a line."""
MAX_DOCUMENT = 2 << 30
"""Bytes of a file that is read whole."""
MAX_PIPED = 256 << 20
"""Bytes of standard input."""
MAX_RATIO, SMALL = 100, 64 << 20
"""How many times as large as its file zipped text may be, from a size on: real annotations are ten times."""
PIPED = Path("-")
"""What standard input is called."""


def is_file(path: Path) -> bool:
    """Whether there is a file, or standard input, at a path; False, not an error, for names that no file can have."""
    return path == PIPED or os.path.isfile(path)


_piped: list[tuple[Any, bytes]] = []
"""The stream that standard input was, and what it gave: it can be read once."""


def standard_input() -> bytes:
    """All of standard input, however often it is asked for; DataError where there is none, or too much."""
    if _piped and _piped[0][0] is sys.stdin:
        return _piped[0][1]
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("- is standard input, and nothing is sent there", "for example: ... --data - < records.jsonl")
    data = read_up_to(sys.stdin.buffer, MAX_PIPED + 1)
    if len(data) > MAX_PIPED:
        raise DataError(f"standard input has more than {size_shown(MAX_PIPED)}", "give a file")
    _piped[:] = [(sys.stdin, data)]
    return data


class File:
    """A file or folder; what is read of it is kept, so that asking twice costs nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The file's name without ``.gz``."""
        return self.path.name.removesuffix(".gz")

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    def open(self) -> IO[bytes]:
        """The bytes, unzipped; by the first two bytes, whatever the name is. DataError for what is no regular file."""
        try:
            file = io.BytesIO(standard_input()) if self.path == PIPED else open_regular(self.path)
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
        except Unreadable as error:
            raise DataError(f"{self.path} can't be read: {error}", "check the file") from error
        except OSError as error:
            raise self._damaged(error) from error
        return gzip.open(file) if zipped else file  # type: ignore[return-value]

    def _most(self, file: IO[bytes], limit: int) -> int:
        """How many bytes are read of an open file."""
        if not isinstance(file, gzip.GzipFile):
            return limit
        packed = len(standard_input()) if self.path == PIPED else os.path.getsize(self.path)
        return min(limit, max(SMALL, MAX_RATIO * packed))

    def lines(self, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(number, line) as far as the file is good; one of :data:`DAMAGED` where it no longer is.

        A line of more than ``longest`` bytes (default: :data:`MAX_LINE`) is not.
        """
        longest = MAX_LINE if longest is None else longest
        with self.open() as file:
            left, number = self._most(file, sys.maxsize), 0
            while line := file.readline(longest + 1):
                number += 1
                left -= len(line)
                if len(line) > longest:
                    raise EOFError(f"a line of more than {size_shown(longest)}")
                if left < 0:
                    raise EOFError(f"it is unzipped to more than {MAX_RATIO} times its size")
                yield number, line

    @cached_property
    def head(self) -> bytes:
        """The first bytes, without byte order mark and leading white space; DataError if there is nothing."""
        try:
            with self.open() as file:
                start = file.read(_HEAD)
        except DAMAGED as error:
            raise self._damaged(error) from error
        text = start.removeprefix(_BOM).lstrip()
        if not text:
            raise DataError(f"{self.path} is empty", "give a file with records")
        return text

    @cached_property
    def line(self) -> str:
        """The first line that is not blank, as far as the head has it; bytes that are no UTF-8 are replaced."""
        return self.head.split(b"\n", 1)[0].decode("utf-8", "replace").strip()

    @cached_property
    def shape(self) -> Shape:
        """JSON Lines, a JSON list or object, a pickle, a folder, or other text."""
        if os.path.isdir(self.path):
            return "folder"
        if self.path.suffix in PICKLES or self.head.startswith(b"\x80"):
            return "pickle"
        if self.head.startswith(b"["):
            return "list"
        if self.head.startswith(b"{"):
            return "object" if self._one_object() else "lines"
        return "text"

    def _one_object(self) -> bool:
        """One object a line is JSON Lines, also where the first is broken; an object over lines is one document."""
        line = self.head.split(b"\n", 1)[0].strip()
        first = None
        if b"\n" in self.head:
            try:
                first = json.loads(line)
            except (ValueError, RecursionError):
                return not (len(line) > 1 and (line.endswith(b"}") or b"\n{" in self.head))
        else:  # one line, or a line too long for the head
            first = next((value for _, value in self._start() if value is not None), None)
            if first is None:
                return not line.endswith(b"}")
        return isinstance(first, dict) and _is_document(first)

    def _start(self, count: int = 5) -> Iterator[tuple[int, Any]]:
        """(number, value or None) of the first lines."""
        try:
            # a document, such as COCO's, may be one line of hundreds of megabytes
            for number, raw in islice(self.lines(MAX_DOCUMENT), count):
                try:
                    yield number, json.loads(raw.removeprefix(_BOM))
                except (ValueError, RecursionError):
                    yield number, None
        except DAMAGED as error:
            raise self._damaged(error) from error

    @cached_property
    def sample(self) -> dict[str, Any]:
        """The first object of JSON Lines or a JSON list, or the object itself; empty where there is none."""
        if self.shape == "lines":
            found: list[Any] = [value for _, value in self._start()]
        elif self.shape == "list":
            found = self.value[:5] if isinstance(self.value, list) else []
        else:
            found = [self.value] if self.shape == "object" else []
        return next((value for value in found if isinstance(value, dict)), {})

    @cached_property
    def value(self) -> Any:
        """The whole file as one JSON value or pickle of plain values."""
        try:
            with self.open() as file:
                most = self._most(file, MAX_PICKLED_RECORDS if self.shape == "pickle" else MAX_DOCUMENT)
                data = read_up_to(file, most + 1)
        except DAMAGED as error:
            raise self._damaged(error) from error
        if len(data) > most:
            raise DataError(f"{self.path} has more than {size_shown(most)} to be read at once", "give JSON Lines")
        if self.shape == "pickle":
            return read_plain_pickle(self.path, data)
        try:
            return json.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text", "save it as UTF-8") from error
        except json.JSONDecodeError as error:
            where = f"{self.path}:{error.lineno}"
            raise DataError(f"{where}: expected JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise DataError(f"{self.path}: nested too deeply") from error
        except ValueError as error:  # a number of thousands of digits
            raise DataError(f"{self.path}: expected JSON: {error}") from error

    def _damaged(self, error: Exception) -> DataError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return DataError(f"{self.path} can't be read: {reason}", "check the file")


def _is_document(value: dict[str, Any]) -> bool:
    """Whether an object is a whole data set (tables, or entries by id) and not one record."""
    if any(isinstance(value.get(name), list) for name in ("annotations", "questions")):
        return True
    images = value.get("images")
    if isinstance(images, list) and all(isinstance(image, dict) for image in images):
        return True
    return bool(value) and all(isinstance(entry, dict) for entry in value.values())
