"""Files of ``torch.save``, read without running what is pickled in them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from mplug_core.errors import CheckpointError


def read_pickled(file: Path, hint: str = "give a file of tensors") -> Any:
    """Tensors and plain values of a file, on the CPU; CheckpointError if it is not there, damaged or holds more.

    Tensors of the format of today, a zip archive, are mapped: they are read from the disk when they are used.
    """
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"cannot read {file}: it is empty", hint)
        with open(file, "rb") as stream:
            begin = stream.read(2)
        mapped = begin == b"PK"
        if not mapped and begin[:1] != b"\x80":
            raise CheckpointError(f"cannot read {file}: it is no file of torch.save", hint)
        return torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(f"cannot read {file}: {_reason(file, error)}", hint) from error


def _reason(file: Path, error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    if getattr(error, "strerror", None):
        return str(error.strerror)  # type: ignore[attr-defined]
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it holds {refused[1]}, which is no tensor; nothing of it was run"
    if "central directory" in text or "zip archive" in text:
        return "it is cut off or damaged" if not zipfile.is_zipfile(file) else "its archive is damaged"
    return next(iter(text.splitlines()), "") or f"it is damaged ({type(error).__name__})"
