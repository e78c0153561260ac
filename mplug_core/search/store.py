"""Features of a folder's images, kept beside them in ``.mplug/`` so that the second search need not look at a pixel.

A store is a folder of parts for a model, each a safetensors file: the features [n, E], and as tensors, too, what they
are of: names (their bytes, one after the other, and where each ends), sizes and times of change. A header that lists a
million names would be too long to be read. New features are a new part; parts that are no larger than what comes are
merged with it, so that there are few, and a feature is written a few times however many follow it. A part appears whole
or not at all, by rename, and parts that were merged go afterwards: whoever is killed loses the part that he was
writing, and two processes lose nothing. Where the folder can't be written, the store is under the user's cache folder
(``$XDG_CACHE_HOME/mplug``, else ``~/.cache/mplug``) instead.

Nothing of it is needed: a part that is damaged, of another model or out of date is computed anew. One file with all
names in its header, as earlier versions wrote it, is read, and replaced by a part.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mplug_core.home import cache_home
from mplug_core.weights.folder import Loaded

FOLDER = ".mplug"
VERSION = "1"
"""Of the layout of the file, and of how a feature is computed."""

MERGED = 2
"""How many times as large as what comes a part may be that is merged with it."""
SMALL = 2000
"""Features of a part that is merged with whatever comes."""
ENTRY = 64
"""Bytes that the name, size and time of a feature take, about."""
LEFT_SECONDS = 86_400

_MODEL_FILES = (".json", ".safetensors", ".bin", ".pth", ".pt")
_BLOCKS, _BLOCK = 64, 4096
_DAMAGES = (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError)


@dataclass(frozen=True)
class Stamp:
    """What tells that a file is the one whose feature is known: its size, and when it was changed."""

    size: int
    mtime_ns: int


@dataclass
class Part:
    """Features [n, E] float32, and of each the file's name, size and time of change; ``file`` is where it is stored."""

    names: list[str]
    stamps: Tensor
    features: Tensor
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, chosen: Sequence[int]) -> Part:
        """Some of it."""
        index = torch.tensor(list(chosen), dtype=torch.int64)
        return Part([self.names[row] for row in chosen], self.stamps[index], self.features[index])


@dataclass
class Store:
    """What is known of the images of one folder. ``note`` says what was wrong with a file that it was read from."""

    parts: list[Part] = field(default_factory=list)
    note: str | None = None

    def __post_init__(self) -> None:
        self._rows: list[dict[str, int]] = [
            {name: row for row, name in enumerate(part.names)} for part in self.parts
        ]

    def names(self) -> set[str]:
        """The files of which something is known."""
        return set().union(*self._rows)

    def feature(self, name: str, stamp: Stamp) -> Tensor | None:
        """The feature [E] of a file as it is now; None if it is not known."""
        for part, rows in zip(self.parts, self._rows, strict=True):
            row = rows.get(name)
            if row is not None and part.stamps[row].tolist() == [stamp.size, stamp.mtime_ns]:
                return part.features[row]
        return None


def fingerprint(loaded: Loaded) -> str:
    """What tells models apart, as far as features go: their files by size, time and samples, and the number type.

    Samples, because unpacked archives can give files of all models the same time; not all bytes, because reading
    gigabytes would take longer than a search.
    """
    digest = hashlib.sha256(f"{VERSION} {loaded.dtype}".encode())
    folder = loaded.folder
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    for file in files:
        if file.suffix in _MODEL_FILES and file.is_file():
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
            with open(file, "rb") as stream:
                for place in range(_BLOCKS):
                    stream.seek(max(status.st_size - _BLOCK, 0) * place // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where stores go whose own folder can't be written."""
    return cache_home() / "mplug" / "features"


def places(folder: str, key: str) -> list[Path]:
    """Where the store of a folder for a model may be: beside the images, unless a link is there, and in the cache."""
    whole = os.fsencode(os.path.realpath(folder))
    name = f"features-{key}"
    beside = Path(folder) / FOLDER
    # whoever gave us the images may have put a link there, which leads to other folders of the user
    found = [] if beside.is_symlink() or (beside / name).is_symlink() else [beside / name]
    return [*found, cache_folder() / hashlib.sha256(whole).hexdigest()[:16] / name]


def read_store(folder: str, key: str, dim: int) -> Store:
    """All that is known of a folder; what can't be used of it is left out, with a note."""
    parts, notes = [], []
    # a folder that could be written once and can't any more has two: entries say themselves whether they still hold
    for place in places(folder, key):
        found, faults = _read_parts(place, dim)
        parts, notes = parts + found, notes + faults
    return Store(parts, notes[0] if notes else None)


def _read_parts(place: Path, dim: int) -> tuple[list[Part], list[str]]:
    """The parts of a store, the smallest last, and a line for each that can't be used."""
    parts: dict[Path, Part] = {}
    notes = []
    listed = [place.with_name(f"{place.name}.safetensors"), *_part_files(place)]
    for file in listed:
        try:
            parts[file] = _read(file, place, dim)
        except (FileNotFoundError, NotADirectoryError):  # another process has merged it: what it became comes next
            listed += [other for other in _part_files(place) if other not in listed]
        except PermissionError:
            pass
        except _DAMAGES as error:
            reason = " ".join(str(error).split())[:80]
            notes.append(f"{file} is damaged ({reason}): its features are computed again")
            if file.is_dir() or not isinstance(error, OSError):  # a disk that fails for a moment has damaged nothing
                _remove(file)
    return sorted(parts.values(), key=len, reverse=True), notes


def _remove(file: Path) -> None:
    with suppress(OSError):
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def _part_files(place: Path) -> list[Path]:
    try:
        return sorted(file for file in place.iterdir() if file.suffix == ".safetensors" and file.name[0] != ".")
    except OSError:
        return []


def _read(file: Path, place: Path, dim: int) -> Part:
    """A part of the store ``place``, or the one file beside it that earlier versions wrote."""
    if file.parent != place:
        return _read_older(file, dim)
    tensors = load(file.read_bytes())  # safetensors opens no path that isn't UTF-8
    features, stamps, ends, data = (tensors[name] for name in ("features", "stamps", "ends", "names"))
    if data.dtype != torch.uint8 or stamps.dtype != torch.int64 or ends.dtype != torch.int64 or ends.dim() != 1:
        raise ValueError("tensors of other types")
    whole, begin, names = data.numpy().tobytes(), 0, []
    for end in ends.tolist():
        names.append(os.fsdecode(whole[begin:end]))
        begin = end
    return _checked(Part(names, stamps, features, file), dim)


def _read_older(file: Path, dim: int) -> Part:
    """One file for all, with names, sizes and times in its header."""
    data = file.read_bytes()
    features = load(data)["features"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    index = json.loads(header["__metadata__"]["index"])
    stamps = torch.tensor([[int(size), int(mtime)] for _, size, mtime in index], dtype=torch.int64).view(-1, 2)
    return _checked(Part([str(name) for name, _, _ in index], stamps, features, file), dim)


def _checked(part: Part, dim: int) -> Part:
    """ValueError for what is no part of features of ``dim`` numbers."""
    if part.features.shape != (len(part), dim) or part.features.dtype != torch.float32:
        raise ValueError(f"features of shape {tuple(part.features.shape)} for {len(part)} files")
    if part.stamps.shape != (len(part), 2):
        raise ValueError(f"stamps of shape {tuple(part.stamps.shape)} for {len(part)} files")
    if not part.features.isfinite().all():
        raise ValueError("features that are no numbers")
    return part


def write_store(folder: str, key: str, dim: int, new: Mapping[tuple[str, Stamp], Tensor]) -> str | None:
    """Add ``new`` to a folder's store; a line if it can't be written anywhere.

    Parts that are no larger than what comes are merged with it, without files that are gone or changed. What another
    process has added in the meantime is kept.
    """
    names = [name for name, _ in new]
    stamps = torch.tensor([[stamp.size, stamp.mtime_ns] for _, stamp in new], dtype=torch.int64).view(-1, 2)
    features = torch.stack(list(new.values())).float() if new else torch.empty(0, dim)
    reason = ""
    for place in places(folder, key):
        try:
            place.mkdir(parents=True, exist_ok=True)
            _sweep(place)
            _add(place, folder, Part(names, stamps, features), dim)
            return None
        except OSError as error:
            reason = error.strerror or str(error)
    return f"the features of {folder} can't be kept: {reason}"


def _add(place: Path, folder: str, part: Part, dim: int) -> None:
    """Write a part to a store, merged with those that are small, or no larger than it is."""
    merged, absorbed = [part], []
    count = len(part)
    for file in [place.with_name(f"{place.name}.safetensors"), *sorted(_part_files(place), key=_bytes)]:
        # by the size of the file first: what stays is not read
        if file.parent == place and _bytes(file) > max(MERGED * count, SMALL) * (4 * dim + ENTRY):
            break
        try:
            other = _read(file, place, dim)
        except _DAMAGES:  # or gone: who reads it next says so
            continue
        merged.append(other)
        absorbed.append(file)
        count += len(other)
    kept = _present(merged, folder) if absorbed else part
    if len(kept):
        _write(place, kept)
    for file in absorbed:
        _remove(file)


def _present(parts: Sequence[Part], folder: str) -> Part:
    """Parts in one, the first that knows a file, without those that are not there as they were."""
    seen: set[str] = set()
    kept = []
    for part in parts:
        rows = []
        for row, (name, stamp) in enumerate(zip(part.names, part.stamps.tolist(), strict=True)):
            if name not in seen and stamp_of(os.path.join(folder, name)) == Stamp(*stamp):
                seen.add(name)
                rows.append(row)
        kept.append(part.rows(rows))
    names = [name for part in kept for name in part.names]
    return Part(names, torch.cat([part.stamps for part in kept]), torch.cat([part.features for part in kept]))


def _write(place: Path, part: Part) -> None:
    names = [os.fsencode(name) for name in part.names]
    data = save({
        "features": part.features.contiguous(),
        "stamps": part.stamps.contiguous(),
        "ends": torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
        "names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
    })  # fmt: skip
    _replace(place / f"{secrets.token_hex(8)}.safetensors", data)


def _bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _sweep(place: Path) -> None:
    """Remove what processes that were killed have left half written, a day ago or longer."""
    for file in place.glob(".*.safetensors-*"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > LEFT_SECONDS:
                file.unlink()


def stamp_of(file: str) -> Stamp | None:
    """None for what is no file: an address, standard input, a path without anything there."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return Stamp(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _replace(place: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    descriptor, beside = tempfile.mkstemp(prefix=f".{place.name}-", dir=place.parent)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # readable for whoever can read the folder: temporary files are their owner's alone
        os.chmod(beside, place.parent.stat().st_mode & 0o666)
        os.replace(beside, place)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
