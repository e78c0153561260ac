"""Checkpoints that are complete or absent: written beside, renamed, and only then pointed to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mplug_core.errors import CheckpointError
from mplug_core.training.distributed import World
from mplug_core.weights.pickled import read_pickled

POINTER = "latest"
ANEW = "--resume never starts anew"


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that the pointer of a run folder names, if any."""
    pointer = checkpoint_folder(run) / POINTER
    if not pointer.is_file():
        return None
    folder = checkpoint_folder(run) / pointer.read_text(encoding="utf-8").strip()
    if not (folder / "meta.json").is_file():
        raise CheckpointError(f"{pointer} names {folder.name}, which is not there", "--resume never starts anew")
    return folder


def write_checkpoint(
    run: Path,
    name: str,
    world: World,
    save: Callable[[Path], None],
    state: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of all processes and remove all but the last ``keep``.

    ``save`` writes the engine's part (every process), ``state`` (tensors and plain values) and ``meta`` (JSON) are
    those of the first process.
    """
    root = checkpoint_folder(run)
    beside, folder = root / f".{name}", root / name
    if world.is_first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    world.barrier()
    save(beside)
    rng = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(world.device)
    torch.save(rng, beside / f"rng-{world.rank}.pt")
    world.barrier()
    if world.is_first:
        torch.save(state, beside / "state.pt")
        (beside / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for file in beside.rglob("*"):
            if file.is_file():
                sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)
        pointer = root / f".{POINTER}"
        pointer.write_text(name, encoding="utf-8")
        sync(pointer)
        os.replace(pointer, root / POINTER)
        # by time: a run that was started anew in this folder counts its steps from 0 again
        written = [p for p in root.iterdir() if (p / "meta.json").is_file() and not p.name.startswith(".")]
        written.sort(key=lambda p: ((p / "meta.json").stat().st_mtime_ns, p.name))
        for old in [p for p in written if p != folder][: len(written) - keep]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return folder


def read_checkpoint(folder: Path, world: World) -> tuple[dict[str, Any], dict[str, Any]]:
    """``state`` and ``meta`` of a checkpoint; CheckpointError if it is damaged or of another number of processes."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        written_by = int(meta["world"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {folder / 'meta.json'}: {error}", ANEW) from error
    state = read_pickled(folder / "state.pt", ANEW)
    if written_by != world.size:
        raise CheckpointError(
            f"{folder} was written by {written_by} processes, these are {world.size}", f"start {written_by}"
        )
    return state, meta


def restore_random(folder: Path, world: World) -> None:
    """Set the random states of this process to those of a checkpoint."""
    states = read_pickled(folder / f"rng-{world.rank}.pt", ANEW)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], world.device)


def sync(file: Path) -> None:
    """Have the disk hold what was written."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
