"""Runs that are killed while they save: ``python -m tests.faults.killed_saves RECIPE FOLDER THREADS POINT...``.

For each point a process is forked that trains as RECIPE (JSON) says, in FOLDER/POINT, and kills itself by SIGKILL when
the saving of step 4 comes to that point. Nothing in the product knows of this: calls are replaced from outside.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mplug_core import atomic
from mplug_core.recipe import Recipe
from mplug_core.training import checkpoint
from mplug_core.training.trainer import train
from mplug_core.weights.tensor_files import TensorFile

STEP, OLD = "step-00000004", "step-00000002"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, when: Callable[..., bool], first: Callable[..., None] = lambda *a: None) -> None:
    """Have the process die before ``owner.name`` is called with arguments for which ``when`` holds."""
    real = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            first(*args)
            die()
        return real(*args, **kwargs)

    setattr(owner, name, called)


def half_removed(folder: Path, *rest: Any) -> None:
    (Path(folder) / "meta.json").unlink()
    next(Path(folder).glob("engine-*")).unlink()


def half_written(file: TensorFile, name: str, tensor: Any) -> None:
    file._stream.write(b"\0" * 100)
    file._stream.flush()


POINTS: dict[str, Callable[[], None]] = {
    "engine_files": lambda: before(
        TensorFile,
        "add",
        lambda file, *rest: STEP in str(file.file) and file.file.name.startswith("engine-") and len(file._left) < 9,
        half_written,
    ),
    "manifest": lambda: before(checkpoint, "_publish", lambda root, beside, folder, sealed: folder.name == STEP),
    "rename": lambda: before(os, "rename", lambda source, target: Path(source).name == f".{STEP}"),
    "pointer": lambda: before(
        os, "replace", lambda source, target: Path(target).name == "latest" and STEP in Path(source).read_text()
    ),
    "removing": lambda: before(
        shutil, "rmtree", lambda path, *rest: Path(path).name == f".old-{OLD}" and Path(path).exists(), half_removed
    ),
    "model_folder": lambda: before(
        atomic, "exchange", lambda one, other: (Path(other).parent / "checkpoints" / STEP).exists()
    ),
}


def killed(recipe: Recipe, folder: Path, point: str, threads: int) -> int:
    """Status of a process that trains and dies at a point."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    try:
        torch.set_num_threads(threads)
        POINTS[point]()
        run = recipe.run.model_copy(update={"folder": str(folder / point)})
        train(recipe.model_copy(update={"run": run}))
    finally:
        os._exit(99)  # it should be dead


if __name__ == "__main__":
    settings = Recipe.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for chosen in sys.argv[4:]:
        status = killed(settings, Path(sys.argv[2]), chosen, int(sys.argv[3]))
        if status != signal.SIGKILL:
            sys.exit(f"{chosen}: ended with status {status}, not by SIGKILL")
