"""Repositories of models: how one is named, and which of its files make a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mplug_core.errors import CheckpointError
from mplug_core.weights.sharded import INDEX, SHARD, WHOLE_INDEXES

WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Weights that are read together with the files beside them; of several the first."""
ALONE = (".pth", ".pt", ".bin", ".ckpt", ".th", ".safetensors")
"""Suffixes of files that may hold a model by themselves."""
BESIDE = (".json", ".yaml", ".txt", ".md")
"""Suffixes of the small files beside weights: configuration, vocabulary, recipe, card."""
_STEP = r"[\w-][\w.-]*"
_NAME, _FILE, _REVISION = rf"(?P<name>{_STEP}/{_STEP})", rf"(?P<file>{_STEP}(?:/{_STEP})*)", r"(?P<revision>[^\s@]+)"
_SPEC = re.compile(f"{_NAME}(?:/{_FILE})?(?:@{_REVISION})?", re.ASCII)


@dataclass(frozen=True)
class RepositoryName:
    """``org/name[/file][@revision]``: a whole model, or one file of it."""

    name: str
    file: str | None
    revision: str | None

    @classmethod
    def parse(cls, scheme: str, text: str) -> RepositoryName:
        """CheckpointError for what is no such name."""
        match = _SPEC.fullmatch(text)
        if match is None:
            raise CheckpointError(
                f"{scheme}:{text} names no model", f"{scheme}:org/name, {scheme}:org/name@revision", "bad_name"
            )
        return cls(match["name"], match["file"], match["revision"])


def wanted_files(files: Iterable[str], spec: str) -> list[str]:
    """The files that make the model, weights last: whoever has them has all. CheckpointError if there are none.

    ``files`` are paths inside the repository that ``spec`` names; those in folders are left alone.
    """
    top = sorted(file for file in files if not {"/", "\\"} & set(file) and not file.startswith("."))
    whole = next((name for name in WHOLE if name in top), None)
    index = next((name for name in WHOLE_INDEXES if name in top), None)
    if whole is None and index is not None:
        shards = [
            name for name in top if (m := SHARD.fullmatch(name)) and f"{m['stem']}{m['suffix']}{INDEX}" == index
        ]
        others = [name for name in top if PurePosixPath(name).suffix in BESIDE and name != index]
        return [*others, *shards, index]
    alone = [whole] if whole else [name for name in top if PurePosixPath(name).suffix in ALONE]
    if not alone:
        raise CheckpointError(f"{spec} holds no weights of a model", f"expected {WHOLE[0]}, {WHOLE[1]} or a .pth file")
    if len(alone) > 1:
        raise CheckpointError(f"{spec} holds several: {', '.join(alone)}", f"name one: {spec.split('@')[0]}/{alone[0]}")
    return [name for name in top if PurePosixPath(name).suffix in BESIDE] + alone


def alone_in(folder: Path) -> list[Path]:
    """The files of a folder that may hold a model by themselves."""
    return sorted(f for f in folder.iterdir() if f.suffix in ALONE and not f.name.startswith(".") and f.is_file())


def model_in(folder: Path) -> Path | None:
    """What is to be read of a folder of downloaded files: the folder, its only file of weights, or None."""
    if any((folder / name).is_file() for name in (*WHOLE, *WHOLE_INDEXES)):
        return folder
    try:
        alone = alone_in(folder)
    except OSError:
        return None
    return alone[0] if len(alone) == 1 else None
