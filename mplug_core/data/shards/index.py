"""``index.json``: the shards of a pack and what they hold. Whatever it says is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mplug_core.bounded import Unreadable, parse_json, shown
from mplug_core.errors import DataError
from mplug_core.json_text import to_json

INDEX = "index.json"
FORMAT = "mplug-shards"
VERSION = 1
KIND_NAMES = ("captions", "questions", "phrases", "statements", "entailments")

Count = Annotated[int, Field(ge=0, lt=2**53)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """Size and SHA-256 of a file."""

    bytes: Count
    sha256: Sha256


class ShardEntry(FileEntry):
    """One tar and the two files beside it, whose names follow from the tar's. ``first``: its first sample's number."""

    # no folder, no scheme: a pack can't point outside itself
    name: Annotated[str, Field(pattern=r"^[0-9]{5,9}\.tar$")]
    first: Count
    samples: Annotated[int, Field(gt=0, lt=2**40)]
    offsets: FileEntry
    texts: FileEntry

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")

    @property
    def offsets_name(self) -> str:
        return f"{self.stem}.idx"

    @property
    def texts_name(self) -> str:
        return f"{self.stem}.jsonl.gz"

    def files(self) -> Iterator[tuple[str, FileEntry]]:
        """Name and entry of the tar and of what is beside it."""
        yield self.name, self
        yield self.offsets_name, self.offsets
        yield self.texts_name, self.texts


class KindSummary(_Strict):
    """The records of one kind. ``values`` counts the most frequent answers, labels, phrases or domains."""

    records: Count
    images: Count
    words: dict[str, float]
    values: dict[str, int] = Field(default_factory=dict)
    distinct: Count = 0


class PackIndex(_Strict):
    """The whole of ``index.json``. ``per_sample`` is the most images that a sample has (pairs are kept together)."""

    format: Literal["mplug-shards"]
    version: int
    source: str
    text_only: bool
    samples: Count
    images: Count
    per_sample: Count
    kinds: dict[Literal["captions", "questions", "phrases", "statements", "entailments"], KindSummary]
    left_out: dict[str, int]
    shards: list[ShardEntry]

    @model_validator(mode="after")
    def consistent(self) -> PackIndex:
        if self.samples != sum(shard.samples for shard in self.shards):
            raise ValueError("samples: not the sum of the shards' samples")
        ends = accumulate(shard.samples for shard in self.shards)
        for shard, first in zip(self.shards, (0, *ends), strict=False):
            if shard.first != first:
                raise ValueError(f"shards: {shard.name} begins at {shard.first}, the samples before are {first}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) < len(names):
            raise ValueError("shards: a name comes twice")
        return self

    def require(self, kind: str, task: str, where: str) -> None:
        """DataError where the pack has no records of ``kind``, which ``task`` needs."""
        if kind not in self.kinds:
            raise DataError(f"{where} has no {kind} for task {task}", f"it has {', '.join(self.kinds) or 'nothing'}")


def parse_index(data: bytes, where: str) -> PackIndex:
    """The index in ``data``; DataError that names ``where`` and every fault."""
    try:
        values = parse_json(data)
    except Unreadable as error:
        raise DataError(f"{where} can't be read: {error}", "pack the data again") from error
    if isinstance(values, dict) and values.get("format") == FORMAT and values.get("version") != VERSION:
        raise DataError(f"{where} has version {shown(values.get('version'))}", f"this mplug reads version {VERSION}")
    try:
        index = PackIndex.model_validate_json(data)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()[:5])
        raise DataError(f"{where} is not the index of a pack: {faults}", "pack the data again") from error
    if not index.shards:
        raise DataError(f"{where} lists no shards", "pack the data again")
    return index


def is_pack_folder(folder: str | Path) -> bool:
    """Whether a local folder has the index of a pack."""
    try:
        with open(os.path.join(folder, INDEX), "rb") as file:
            head = file.read(200)
    except OSError:
        return False
    return f'"{FORMAT}"'.encode() in head


def dump_index(index: PackIndex) -> bytes:
    """The bytes of ``index.json``, a line a shard."""
    values: dict[str, Any] = index.model_dump(mode="json")
    shards = values.pop("shards")
    head = to_json(values, ensure_ascii=False, indent=1)[:-2]
    lines = ",\n".join("  " + to_json(shard) for shard in shards)
    return f'{head},\n "shards": [\n{lines}\n ]\n}}\n'.encode()


def write_atomically(file: Path, data: bytes) -> None:
    """``data`` in ``file``, or what was there before; never a part of it."""
    beside = file.with_name(f".{file.name}.part")
    with open(beside, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)
