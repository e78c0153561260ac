"""Files of ``torch.save``, read within bounds and without running what is pickled in them."""

from __future__ import annotations

import io
import mmap
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from mplug_core.bounded import MAX_PICKLE, OrderedMapping, PlainUnpickler, Unreadable, size_shown, unpickled
from mplug_core.errors import CheckpointError
from mplug_core.weights.tensor_names import check_storage

_LOADING = threading.Lock()
"""Held while torch knows numpy: what it knows is of the whole process."""
ALONE = "save its tensors alone: torch.save(model.state_dict(), FILE)"


def read_pickled(file: Path, hint: str = "give a file of tensors") -> Any:
    """Tensors and plain values of a file, on the CPU; CheckpointError if it is not there, damaged or holds more.

    Scalars and arrays of numpy are plain values, too. Tensors of the format of today, a zip archive, are mapped: they
    are read from the disk when they are used.
    """
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"cannot read {file}: it is empty", hint)
        with open(file, "rb") as stream:
            begin = stream.read(2)
        mapped = begin == b"PK"
        if not mapped and begin[:1] != b"\x80":
            raise CheckpointError(f"cannot read {file}: it is no file of torch.save", hint)
        if mapped:
            _check_archive(file)
        else:
            _check_old(file)
        with _LOADING, _numpy_allowed():
            content = torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
        for name, value in _tensors_in(content):
            check_storage(name, value)
        return content
    except CheckpointError as error:
        if str(file) in error.message:
            raise
        raise CheckpointError(f"cannot read {file}: {error.message}", error.hint) from error
    except Exception as error:  # a damaged pickle may fail in any way
        text = str(error)
        refused = re.search(r"GLOBAL (\S+)", text)
        if refused:
            what = f"it holds {refused[1]}, which is no tensor; nothing of it was run"
            raise CheckpointError(f"cannot read {file}: {what}", ALONE) from error
        raise CheckpointError(f"cannot read {file}: {_reason(file, error)}", hint) from error


def _tensors_in(content: Any, depth: int = 8) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of mappings inside one another, with their names."""
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif depth:
            yield from _tensors_in(value, depth - 1)


def _reason(file: Path, error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    if getattr(error, "strerror", None):
        return str(error.strerror)  # type: ignore[attr-defined]
    text = str(error)
    if "central directory" in text or "zip archive" in text or isinstance(error, zipfile.BadZipFile):
        return "it is cut off or damaged" if not zipfile.is_zipfile(file) else "its archive is damaged"
    return next(iter(text.splitlines()), "") or f"it is damaged ({type(error).__name__})"


class Hollow:
    """Stands for whatever a pickle names; made of anything, and of no effect."""

    def __new__(cls, *arguments: Any, **named: Any) -> Hollow:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Checker(PlainUnpickler):
    """Goes through a pickle of tensors, to see that it is within bounds before torch makes anything of it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedMapping
        return Hollow

    def persistent_load(self, pid: Any) -> Any:
        return None


def _check_archive(file: Path) -> None:
    """Unreadable for a zip archive whose pickle is out of bounds, or that is packed: torch packs nothing."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED and (info.file_size > info.compress_size or info.file_size):
                raise Unreadable(f"{info.filename} is packed in it, which torch.save never does")
        for name in archive.namelist():
            if name == "data.pkl" or name.endswith("/data.pkl"):
                unpickled(_Checker(io.BytesIO(read_member(archive, name))))


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A pickle in an archive; Unreadable where it is packed or too large."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise Unreadable(f"{name} is packed in it, which torch never does")
    if info.file_size > MAX_PICKLE:
        raise Unreadable(f"{name} has more than {size_shown(MAX_PICKLE)}")
    return archive.read(info)


def _check_old(file: Path) -> None:
    """The same for the format before: five pickles, one after the other, then the numbers."""
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(5):
            unpickled(_Checker(data))
            if data.tell() > MAX_PICKLE:
                raise Unreadable(f"its pickle has more than {size_shown(MAX_PICKLE)}")


def _numpy_allowed() -> AbstractContextManager[None]:
    """Numbers and arrays of numpy are read inside the block; what the program allows itself stays allowed after it.

    Before version 2.6 PyTorch takes no names: files with numpy in them are refused there.
    """
    if not hasattr(torch.serialization, "safe_globals") or torch.__version__ < TorchVersion("2.6"):
        return nullcontext()
    allowed = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([one for one in _numpy_globals() if one not in allowed])


@cache
def _numpy_globals() -> list[Any]:
    """What numbers and arrays of numpy are pickled with, by its names before and after version 2."""
    kinds = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFD"]
    found: list[Any] = [*dict.fromkeys(kinds), np.ndarray, (_dtype, "numpy.dtype"), (np.ndarray, "numpy.ndarray")]
    for package in ("core", "_core"):
        found += [(_scalar, f"numpy.{package}.multiarray.scalar"), (_array, f"numpy.{package}.multiarray._reconstruct")]
    return found


def _dtype(kind: Any, *rest: Any) -> np.dtype[Any]:
    found = np.dtype(str(kind))
    if found.kind not in "biufc" or found.itemsize > 32:
        raise Unreadable(f"it holds numpy values of type {found}, which are no numbers")
    return found


def _scalar(dtype: np.dtype[Any], data: Any = b"") -> Any:
    if dtype.kind not in "biufc" or dtype.itemsize > 32:
        raise Unreadable("it holds numpy values that are no numbers")
    raw = data if isinstance(data, bytes) else str(data).encode("latin1")
    if len(raw) != dtype.itemsize:
        raise Unreadable(f"it holds a numpy number of {len(raw)} bytes, not {dtype.itemsize}")
    return np.frombuffer(raw, dtype)[0]


def _array(kind: Any, shape: Any, code: Any) -> Any:
    if kind is not np.ndarray or tuple(shape) != (0,):  # as numpy pickles every array: its state follows
        raise Unreadable("it holds a numpy array that is not as numpy writes it")
    return np.empty(0, np.uint8)
