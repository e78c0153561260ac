"""RefCOCO's ``refs(...).p``: Python 2 pickles, read without running anything that is in them.

A pickle is a program. This reader lets it build dicts, lists, tuples, sets, numbers and texts, and refuses every
class or function that it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mplug_core.bounded import Unreadable, parse_pickle
from mplug_core.errors import DataError

PICKLES = (".p", ".pkl", ".pickle")


def read_plain_pickle(path: Path, data: bytes) -> Any:
    """Dicts, lists, numbers and texts of ``data``; DataError if it is damaged or holds anything else.

    Texts of Python 2 are bytes without encoding: they come back as Latin-1, see :func:`as_text`.
    """
    try:
        return parse_pickle(data, encoding="latin1", limit=len(data))  # the caller has bounded it
    except Unreadable as error:
        raise DataError(f"{path} can't be read as a pickle of plain values: {error}", "check the file") from error


def as_text(text: str) -> str:
    """A text of a Python 2 pickle as it was meant: UTF-8 that was read as Latin-1 is put right."""
    try:
        return text.encode("latin1").decode("utf-8")
    except UnicodeError:
        return text
