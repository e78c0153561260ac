"""Tensors of a TorchScript archive, such as OpenAI's CLIP, without running the code in it.

The archive is a zip: ``data.pkl`` is the tree of modules, ``data/N`` are the bytes of its tensors. Of what the pickle
names, tensors and containers are made; every class of the archive becomes an inert holder of its attributes, and
anything else is refused.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mplug_core.bounded import OrderedMapping, PlainUnpickler, Unreadable, unpickled
from mplug_core.errors import CheckpointError
from mplug_core.weights.pickled import read_member
from mplug_core.weights.tensor_names import check_storage

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
"""Functions of ``torch.jit._pickle`` that give back their first argument."""


def is_torchscript(file: Path) -> bool:
    """Whether a file is an archive of ``torch.jit.save``, which has constants and code beside its tensors."""
    try:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError):
        return False


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names, on the CPU; CheckpointError for a damaged or unsafe archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise Unreadable("it has no data.pkl, so it is damaged")
            module = unpickled(_Unpickler(archive, pickled.removesuffix("data.pkl")))
        return dict(_tensors(module, "", set()))
    except Exception as error:  # a damaged archive may fail in any way
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"cannot read {file}: {reason}", "save its state_dict() as .safetensors") from error


class _Module:
    """Stands for an object of any class of the archive, and only holds its attributes."""

    def __new__(cls, *arguments: Any) -> _Module:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Unpickler(PlainUnpickler):
    """Knows tensors and containers only. What a pickle can reach is made anew for each archive: it may change it."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(read_member(archive, f"{root}data.pkl")))
        self.archive, self.root = archive, root
        self.module = type("Module", (_Module,), {})
        self.known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *given: _rebuilt(*given),
            ("collections", "OrderedDict"): OrderedMapping,
            ("torch", "device"): lambda name: name,
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
            **{("torch.jit._pickle", name): lambda value, *_: value for name in LISTS},
        }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return self.module
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        info = self.archive.getinfo(f"{self.root}data/{key}")
        if kind != "storage" or info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"{info.filename} is not stored as it is")
        if type(count) is not int or not 0 <= count * dtype.itemsize <= info.file_size:
            raise pickle.UnpicklingError(f"{info.filename} has {info.file_size} bytes, and {count} numbers are wanted")
        data = bytearray(self.archive.read(info))
        return torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _rebuilt(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    found = torch.as_strided(storage, size, stride, offset)
    check_storage("a tensor", found)
    return found


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a module and of those inside it, each module once."""
    if not isinstance(module, _Module) or id(module) in seen:
        return
    seen.add(id(module))
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", seen)
