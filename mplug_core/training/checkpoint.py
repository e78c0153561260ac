"""Checkpoints that are complete or absent: written beside, sealed, renamed, and only then pointed to.

A run folder's ``checkpoints/step-00000123/`` holds, all of it tensors or JSON and no pickle:

- ``manifest.json``, written last: size and SHA-256 of every other file;
- ``meta.json``: progress, recipe, number of processes, accumulated parts, stage, time;
- ``engine-*.safetensors``: weights and optimizer by parameter (see ``engine_state``);
- ``parts.safetensors``: teacher, queue and average; ``random-*.safetensors``: random states of each process;
- ``model/``: the model folder, whose weights the run's own ``model/`` shares.

``latest`` beside them names the last one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mplug_core.atomic import copy_folder, replace_text, sweep, sync_file, sync_folder, whole_folder
from mplug_core.bounded import read_json
from mplug_core.errors import CheckpointError, Diverged, MplugError
from mplug_core.json_text import to_json
from mplug_core.training.agreement import together
from mplug_core.training.distributed import ALONE, World
from mplug_core.training.engine_state import KEYS, is_finite
from mplug_core.weights.tensor_files import TensorFiles, write_tensors

FORMAT = 2
FINITE = "finite"
"""Says in ``meta.json`` that all weights and optimizer states are finite."""
POINTER = "latest"
LEFT = (".step-*", ".old-step-*", f".{POINTER}-*.new", f".{POINTER}.new")
"""What kills leave beside checkpoints."""
MANIFEST, META, PARTS = "manifest.json", "meta.json", "parts.safetensors"
ANEW = "--resume never starts anew"
OLDER = ("state.pt", "plain.pt", "engine")
"""What checkpoints of earlier versions hold, which were pickles."""
ROOM = 1 << 20
"""Bytes beyond the tensors: headers, texts, the file system's own."""

Note = Callable[[str], None]


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def write_checkpoint(
    run: Path,
    name: str,
    world: World,
    write: Callable[[Path], None],
    meta: Mapping[str, Any],
    keep: int,
    best: str | None = None,
    need: int = 0,
) -> Path:
    """Write a checkpoint of all processes, and then remove all but the last ``keep`` and the one named ``best``.

    Every process calls this. ``write`` writes a process's files into a folder; where it meets the other processes, an
    OSError must come after the last meeting. ``need``: bytes that all of them will take.

    Raises MplugError, on all processes, where the disk doesn't take it, and Diverged from ``write``; nothing that was
    there before has then gone.
    """
    root = checkpoint_folder(run)
    beside, folder = root / f".{name}", root / name
    with _cleaning(world, beside):
        with together(world), _disk_errors(name, root):
            if world.is_first:
                root.mkdir(parents=True, exist_ok=True)
                _sweep(root)
                _refuse_full_disk(root, need)
                beside.mkdir()
        with together(world), _disk_errors(name, root):
            write(beside)
            if world.is_first:
                full = {**meta, "format": FORMAT, "world": world.size, "written": time.time(), FINITE: True}
                (beside / META).write_text(to_json(full, indent=1), encoding="utf-8")
        found: list[str] | None = None
        with together(world), _disk_errors(name, root):
            if world.is_first:
                found = _files_of(beside)
        names = world.gather_objects(found)[0]
        with together(world), _disk_errors(name, root):
            # what the first process finds is complete, as all have written
            mine = {name: _sealed(beside / name) for name in names[world.rank :: world.size]}
        sealed = {name: entry for part in world.gather_objects(mine) for name, entry in part.items()}
        with together(world), _disk_errors(name, root):
            if world.is_first:
                _publish(root, beside, folder, sealed)
    if world.is_first:
        with suppress(OSError):  # what can't be removed is in nobody's way
            _remove_old(root, folder, keep, best)
    return folder


def publish_model(run: Path, checkpoint: Path, world: World) -> None:
    """Make the model folder of a checkpoint the run's own, whole at any moment; their weights share the disk's space.

    MplugError, on all processes, where the disk doesn't take it.
    """
    with together(world), _disk_errors(checkpoint.name, checkpoint.parent):
        if world.is_first:
            sweep(run / "best")
            with whole_folder(run / "model") as beside:
                copy_folder(checkpoint / "model", beside)


def sweep_checkpoints(run: Path) -> None:
    """Remove what kills have left half written or half removed. Only where no other process writes in the run."""
    _sweep(checkpoint_folder(run))
    for left in run.glob(".model-new*"):  # of earlier versions
        shutil.rmtree(left, ignore_errors=True)


def _files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sealed(file: Path) -> dict[str, Any]:
    """A file's line in the manifest, when the disk holds it."""
    sync_file(file)
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def _publish(root: Path, beside: Path, folder: Path, sealed: Mapping[str, Any]) -> None:
    """Give a complete folder its name, and only then have the pointer name it."""
    manifest = {"format": FORMAT, "files": dict(sorted(sealed.items()))}
    (beside / MANIFEST).write_text(to_json(manifest, indent=1), encoding="utf-8")
    sync_file(beside / MANIFEST)
    for inner in [path for path in beside.rglob("*") if path.is_dir()]:
        sync_folder(inner)
    sync_folder(beside)
    if folder.exists():
        _put_away(folder)
    os.rename(beside, folder)
    sync_folder(root)
    replace_text(root / POINTER, folder.name)


def _remove_old(root: Path, newest: Path, keep: int, best: str | None) -> None:
    """Leave the newest, ``keep - 1`` before it, and the best."""
    old = [folder for folder in written_checkpoints(root) if folder != newest]
    for folder in [folder for folder in old[keep - 1 :] if folder.name != best]:
        _put_away(folder)
    _sweep(root)


def _put_away(folder: Path) -> None:
    """Out of sight at once: a kill half-way through removing it must not leave half a checkpoint."""
    aside = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def _sweep(root: Path) -> None:
    for path in [path for pattern in LEFT for path in root.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _refuse_full_disk(root: Path, need: int) -> None:
    free = shutil.disk_usage(root).free
    if free < need + ROOM:
        raise OSError(28, f"{(need + ROOM) / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")


@contextmanager
def _disk_errors(name: str, root: Path) -> Iterator[None]:
    """What a disk, or the writing of a file, raises becomes one line that names the last good checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        reason = getattr(error, "message", None) or getattr(error, "strerror", None) or str(error)
        pointer = _pointed(root)
        good = f"; {root / pointer} is whole, and the same command goes on from it" if pointer else ""
        raise MplugError(f"cannot save checkpoint {name}: {reason}", f"make room on the disk{good}") from error


@contextmanager
def _cleaning(world: World, beside: Path) -> Iterator[None]:
    """Remove a half-written folder after an error, which is one of all processes: none writes any more."""
    try:
        yield
    except MplugError:
        if world.is_first:
            shutil.rmtree(beside, ignore_errors=True)
        raise


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


# -- reading ---------------------------------------------------------------------------------------------------------


def written_checkpoints(root: Path) -> list[Path]:
    """Checkpoints of a folder, sound or not, the last written first.

    By the time they tell: a run that was started anew in the same folder counts its steps from 0 again.
    """
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.is_dir() and path.name.startswith("step-")]
    return sorted(folders, key=lambda folder: (_written(folder), folder.name), reverse=True)


def _written(folder: Path) -> float:
    try:
        return float(read_json(folder / META)["written"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 0.0


def _pointed(root: Path) -> str | None:
    """The checkpoint that the pointer names, if it is there."""
    try:
        name = (root / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return name if name and PurePosixPath(name).name == name and (root / name).is_dir() else None


def latest_checkpoint(run: Path, world: World | None = None, note: Note = lambda text: None) -> Path | None:
    """The newest sound checkpoint of a run folder, if it has any; every process of ``world`` gets the same.

    The one that the pointer names comes first, then the last written. ``note`` is told which were passed over and why.
    CheckpointError where there are checkpoints and none is sound.
    """
    world = world or ALONE
    root = checkpoint_folder(run)
    # one process looks: where folders are shared by network, others may see them later
    with together(world):
        found = _candidates(root) if world.is_first else None
    names, pointed, said = world.gather_objects(found)[0]
    if said:
        note(f"{root / POINTER} names {said}, which is not there")
    passed = []
    for name in names:
        fault = find_fault(root / name, world)
        if fault is None:
            if passed or said or pointed is None:
                note(f"going on from {root / name}")
            return root / name
        passed.append(f"{name}: {fault}")
        note(f"passing over checkpoint {passed[-1]}")
    if passed:
        raise CheckpointError(
            f"no sound checkpoint in {root}: {'; '.join(passed)}", f"put one back from a copy, or {ANEW}"
        )
    return None


def _candidates(root: Path) -> tuple[list[str], str | None, str]:
    """Names of checkpoints in the order of trying, the one pointed to, and what a stale pointer says."""
    pointed = _pointed(root)
    names = [folder.name for folder in written_checkpoints(root)]
    if pointed is not None:
        return [pointed, *(name for name in names if name != pointed)], pointed, ""
    try:
        return names, None, (root / POINTER).read_text(encoding="utf-8", errors="replace").strip()[:80]
    except OSError:
        return names, None, ""


def require_sound(folder: Path, world: World) -> Path:
    """``folder``, or the newest checkpoint in it if it is a run folder; CheckpointError unless it is sound."""
    if checkpoint_folder(folder).is_dir():
        found = latest_checkpoint(folder, world)
        if found is not None:
            return found
    fault = find_fault(folder, world)
    if fault is not None:
        raise CheckpointError(f"cannot resume {folder}: {fault}", "name a sound checkpoint, or --resume auto finds one")
    return folder


def find_fault(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, if anything: every file is read, each by one of the processes."""
    faults = world.gather_objects(_fault_in_share(folder, world))
    return next((fault for fault in faults if fault is not None), None)


def _fault_in_share(folder: Path, world: World) -> str | None:
    try:
        if not (folder / MANIFEST).exists():
            if any((folder / name).exists() for name in OLDER):
                return "it is of an earlier version, whose checkpoints can't be resumed (start.model takes its model)"
            return f"{MANIFEST} is missing" if folder.is_dir() else "there is no such folder"
        manifest = read_json(folder / MANIFEST)
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        version = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return f"{MANIFEST} is damaged"
    if version != FORMAT:
        return f"it has format {version}, this version reads {FORMAT}"
    if META not in files or not any(name.startswith("engine-") for name in files):
        return f"{MANIFEST} is incomplete"
    checked = _said_finite(folder)
    for name, (size, digest) in sorted(files.items())[world.rank :: world.size]:
        fault = _fault_of_file(folder, name, size, digest)
        if fault is None and not checked and name.startswith("engine-"):
            fault = _not_finite(folder / name)
        if fault is not None:
            return fault
    return None


def _said_finite(folder: Path) -> bool:
    """Whether a checkpoint's numbers were looked at when it was written; earlier versions didn't."""
    try:
        return read_json(folder / META)[FINITE] is True
    except (ValueError, KeyError, TypeError):
        return False


def _not_finite(file: Path) -> str | None:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            if name.partition("/")[0] in KEYS and not is_finite(tensors.get_tensor(name)):
                return f"{name} is not finite"
    return None


def _fault_of_file(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return f"{MANIFEST} names {name}, a file elsewhere"
    file = folder / path
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if sha256(file) != digest:
            return f"{name} is damaged"
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
    except OSError as error:
        return f"{name} can't be read: {error.strerror}"
    except SafetensorError:
        return f"{name} is no file of tensors"
    return None


def read_meta(folder: Path) -> dict[str, Any]:
    """``meta.json`` of a checkpoint that was found sound; CheckpointError where it isn't one."""
    try:
        meta = read_json(folder / META)
        int(meta["world"]), int(meta["accumulate"]), int(meta["pieces"]), dict(meta["progress"]), dict(meta["recipe"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"cannot read {folder / META}: {error}", ANEW) from error
    return meta


def save_parts(folder: Path, parts: Mapping[str, Any]) -> None:
    """Write the states of modules by name (None: there is no such part). Diverged for their weights."""
    for part, module in parts.items():
        for name, weight in module.named_parameters() if module is not None else ():
            if not is_finite(weight):
                raise Diverged(f"the weight {name} of the {part} is not finite")
    write_tensors(folder / PARTS, dict(part_tensors(parts)))


def part_tensors(parts: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for part, module in parts.items():
        for name, value in (module.state_dict() if module is not None else {}).items():
            yield f"{part}/{name}", value


def load_parts(folder: Path, parts: Mapping[str, Any]) -> list[str]:
    """Set modules to what was saved; returns those of which nothing was. CheckpointError if one doesn't fit."""
    saved = TensorFiles([folder / PARTS])
    unknown = []
    for part, module in parts.items():
        if module is None:
            continue
        state = {name.removeprefix(f"{part}/"): saved.read(name) for name in saved if name.startswith(f"{part}/")}
        if not state:
            unknown.append(part)
            continue
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"{folder / PARTS}: {part} does not fit the recipe's model: {reason}", ANEW
            ) from error
    return unknown
