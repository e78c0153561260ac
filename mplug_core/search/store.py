"""Features of a folder's images, kept beside them in ``.mplug/`` so that the second search need not look at a pixel.

A store is one safetensors file for a model: the features [n, E], and in its header an index of what they are of: name,
size and time of change of each file. One file, so that index and features can't part. It is replaced whole, by
rename: a reader sees the old one or the new one. Where the folder can't be written, the store is under the user's
cache folder (``$XDG_CACHE_HOME/mplug``, else ``~/.cache/mplug``) instead.

Nothing of it is needed: a store that is damaged, of another model or out of date is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mplug_core.weights.folder import Loaded

FOLDER = ".mplug"
VERSION = "1"
"""Of the layout of the file, and of how a feature is computed."""

_MODEL_FILES = (".json", ".safetensors", ".bin", ".pth", ".pt")
_BLOCKS, _BLOCK = 64, 4096


@dataclass(frozen=True)
class Stamp:
    """What tells that a file is the one whose feature is known: its size, and when it was changed."""

    size: int
    mtime_ns: int


@dataclass
class Store:
    """What is known of the images of one folder: feature [E] float32 by file name and stamp.

    ``note`` says what was wrong with a file that it was read from.
    """

    known: dict[tuple[str, Stamp], Tensor] = field(default_factory=dict)
    note: str | None = None


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
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification of the variable has relative paths ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mplug" / "features"


def places(folder: str, key: str) -> list[Path]:
    """Where the store of a folder for a model may be: beside the images, and in the cache folder."""
    whole = os.fsencode(os.path.realpath(folder))
    name = f"features-{key}.safetensors"
    found = [Path(folder) / FOLDER / name]
    with suppress(RuntimeError):  # no home
        found.append(cache_folder() / hashlib.sha256(whole).hexdigest()[:16] / name)
    return found


def read_store(folder: str, key: str, dim: int) -> Store:
    """All that is known of a folder; what can't be used of it is left out, with a note."""
    store = Store()
    # a folder that could be written once and can't any more has two: entries say themselves whether they still hold
    for place in places(folder, key):
        try:
            store.known.update(_read(place, dim))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            store.note = f"{place} is damaged ({' '.join(str(error).split())[:80]}): its features are computed again"
    return store


def _read(place: Path, dim: int) -> dict[tuple[str, Stamp], Tensor]:
    data = place.read_bytes()  # safetensors opens no path that isn't UTF-8
    features = load(data)["features"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    index = json.loads(header["__metadata__"]["index"])
    if features.shape != (len(index), dim) or features.dtype != torch.float32:
        raise ValueError(f"features of shape {tuple(features.shape)} for {len(index)} files")
    if not features.isfinite().all():
        raise ValueError("features that are no numbers")
    return {
        (str(name), Stamp(int(size), int(mtime))): feature
        for (name, size, mtime), feature in zip(index, features.unbind(), strict=True)
    }


def write_store(folder: str, key: str, dim: int, new: Mapping[tuple[str, Stamp], Tensor]) -> str | None:
    """Add ``new`` to a folder's store, and drop files that are gone or changed; a line if it can't be written anywhere.

    What another process has added in the meantime is kept.
    """
    present = set(_files(folder))
    known = read_store(folder, key, dim).known | dict(new)
    kept = sorted((of for of in known if of in present), key=lambda of: of[0])
    features = torch.stack([known[of] for of in kept]) if kept else torch.empty(0, dim)
    index = json.dumps([[name, stamp.size, stamp.mtime_ns] for name, stamp in kept])
    data = save({"features": features.float().contiguous()}, {"index": index})
    reason = ""
    for place in places(folder, key):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _replace(place, data)
            return None
        except OSError as error:
            reason = error.strerror or str(error)
    return f"the features of {folder} can't be kept: {reason}"


def stamp_of(file: str) -> Stamp | None:
    """None for what is no file: an address, standard input, a path without anything there."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return Stamp(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _files(folder: str) -> Iterator[tuple[str, Stamp]]:
    with suppress(OSError):
        for name in os.listdir(folder):
            stamp = stamp_of(os.path.join(folder, name))
            if stamp is not None:
                yield name, stamp


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
