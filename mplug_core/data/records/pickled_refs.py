"""RefCOCO's ``refs(...).p``: Python 2 pickles, read without running anything that is in them.

A pickle is a program. This reader lets it build dicts, lists, tuples, sets, numbers and texts, and refuses every
class or function that it names.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from mplug_core.errors import DataError

PICKLES = (".p", ".pkl", ".pickle")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside of it")


def read_plain_pickle(path: Path, data: bytes) -> Any:
    """Dicts, lists, numbers and texts of ``data``; DataError if it is damaged or holds anything else.

    Texts of Python 2 are bytes without encoding: they come back as Latin-1, see :func:`as_text`.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"{path} can't be read as a pickle of plain values: {reason[:200]}"
        raise DataError(message, "check the file") from error


def as_text(text: str) -> str:
    """A text of a Python 2 pickle as it was meant: UTF-8 that was read as Latin-1 is put right."""
    try:
        return text.encode("latin1").decode("utf-8")
    except UnicodeError:
        return text
