"""One file or folder of a data set: opened whether it is gzipped or not, and looked into to see what it is.

Whatever is wrong with a file as a whole is a DataError that names it; nothing that is in a file is executed.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

from mplug_core.data.records.pickled_refs import PICKLES, read_plain_pickle
from mplug_core.errors import DataError

Shape = Literal["folder", "pickle", "lines", "list", "object", "text"]

_HEAD = 1 << 16
_BOM = b"\xef\xbb\xbf"
DAMAGED = (OSError, EOFError, zlib.error)
"""What reading a damaged file raises; gzip.BadGzipFile is an OSError."""


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
        """The bytes, unzipped; by the first two bytes, whatever the name is."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error.strerror}", "check the file") from error
        return gzip.open(file) if zipped else file  # type: ignore[return-value]

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
            with self.open() as file:
                for number, raw in zip(range(count), file, strict=False):
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
                data = file.read()
        except DAMAGED as error:
            raise self._damaged(error) from error
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
