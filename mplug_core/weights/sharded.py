"""Checkpoints in several files, as Hugging Face writes large ones: an index names the file of each tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug_core.bounded import Unreadable, read_json
from mplug_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = ".index.json"
WHOLE_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Names of an index, of several the first; then any other that ends so."""
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.\w+)")
AGAIN = "download the whole folder again"


def is_index(file: Path) -> bool:
    """Whether a file is called as an index is."""
    return file.name.endswith(INDEX)


def index_in(folder: Path) -> Path | None:
    """The index of a folder's checkpoint, where it is in several files."""
    found = next((folder / name for name in WHOLE_INDEXES if (folder / name).is_file()), None)
    others = sorted(folder.glob(f"*{INDEX}")) if found is None else []
    return found or next((file for file in others if file.is_file()), None)


def index_of(file: Path) -> Path:
    """The index that a file is one part of, else the file itself."""
    match = SHARD.fullmatch(file.name)
    index = file.with_name(f"{match['stem']}{match['suffix']}{INDEX}") if match else None
    return index if index is not None and index.is_file() else file


def files_of(index: Path) -> dict[Path, list[str]]:
    """The names of the tensors by the file that they are in; CheckpointError where the index makes no sense."""
    try:
        values = read_json(index, 64 << 20)
    except Unreadable as error:
        raise CheckpointError(f"cannot read {index}: {error}", AGAIN) from error
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f'{index} has no "weight_map" of tensors and files', AGAIN)
    files: dict[Path, list[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index} names {file!r}, which is no file beside it", AGAIN)
        files.setdefault(index.parent / file, []).append(name)
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        count = f"{len(gone)} of {len(files)} files" if len(gone) > 1 else f"1 of {len(files)} files"
        raise CheckpointError(f"{index}: {count} are not there, first {gone[0]}", AGAIN)
    return files


def read_sharded(index: Path, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors of all files of an index, each ``read`` once; CheckpointError for one that its file lacks."""
    import torch  # names of hubs are listed without it

    tensors: dict[str, Tensor] = {}
    for file, names in files_of(index).items():
        content = read(file)
        for name in names:
            if not isinstance(content, Mapping) or not isinstance(content.get(name), torch.Tensor):
                raise CheckpointError(f"{file} has no tensor {name}, which {index.name} says is in it", AGAIN)
            tensors[name] = content[name]
    return tensors
