"""Safetensors files written one tensor at a time, so that a file never has to be in memory whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mplug_core.errors import CheckpointError
from mplug_core.json_text import to_json

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Entry = tuple[torch.dtype, Sequence[int]]


def size_of(entry: Entry) -> int:
    """Bytes of a tensor of this type and shape."""
    dtype, shape = entry
    return dtype.itemsize * int(torch.Size(shape).numel())


class TensorFile:
    """A safetensors file to which tensors are added in the order of ``entries`` (name: type and shape).

    Wide types come first in the file, so that every tensor lies at a multiple of its type's size: ``order`` has the
    names as they are to be added.
    """

    def __init__(self, file: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
        self.file, self.entries = file, entries
        self.order = sorted(entries, key=lambda name: -entries[name][0].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name in self.order:
            dtype, shape = entries[name]
            begin, end = end, end + size_of(entries[name])
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = to_json(header).encode()
        text += b" " * (-len(text) % 8)
        self._left = list(reversed(self.order))
        self._stream = open(file, "wb")  # noqa: SIM115 (closed by close)
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; ValueError if it isn't the one that was announced."""
        if not self._left or self._left.pop() != name or self.entries[name] != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{self.file}: {name} {tensor.dtype} {tuple(tensor.shape)} is not what comes next")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._stream.write(memoryview(data.numpy()))

    def close(self) -> None:
        """Have the disk hold the file; ValueError if tensors are missing."""
        with self._stream:
            if self._left:
                raise ValueError(f"{self.file}: {len(self._left)} tensors were not written, first {self._left[-1]}")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def abandon(self) -> None:
        """Close a file that is not going to be whole."""
        with contextlib.suppress(OSError):  # what is still to be written finds no place: it doesn't matter
            self._stream.close()


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as they are; the same one under several names is written under each."""
    out = TensorFile(file, {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    try:
        for name in out.order:
            out.add(name, tensors[name])
        out.close()
    except BaseException:
        out.abandon()
        raise


class TensorFiles:
    """Tensors by name from several safetensors files, by memory map. CheckpointError for a file that is none."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise unreadable(file, error) from error
            self._where |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Any:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """CheckpointError if there is no such tensor."""
        if name not in self._where:
            raise CheckpointError(f"the checkpoint lacks {name}")
        return self._where[name].get_tensor(name)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file; CheckpointError if it is none."""
    found = TensorFiles([file])
    return {name: found.read(name) for name in found}


def unreadable(file: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return CheckpointError(f"cannot read {file}: {reason}", "--resume never starts anew")
