"""What a run needs to go on as if it had not stopped: the same recipe and global batch, random states, its log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mplug_core.atomic import replace_text
from mplug_core.errors import CheckpointError
from mplug_core.recipe import Recipe
from mplug_core.training.distributed import World
from mplug_core.weights.tensor_files import read_tensors, write_tensors

FREE = (
    "run.", "evaluate.", "data.root", "data.workers", "data.max_bad_fraction", "data.cache", "engine.threads",
    "engine.name", "engine.zero_stage", "engine.checkpointing", "engine.compile", "engine.offload",
    "engine.accumulate",
)  # fmt: skip
"""Keys of a recipe that may change when a run goes on: they say how it is computed and watched, not what it learns."""
TOLD = ("engine.", "data.root")
"""Of these, what a note says: the rest are matters of taste."""
MOST_DIFFERENCES = 10


# -- the recipe ------------------------------------------------------------------------------------------------------


def refuse_other_recipe(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> list[str]:
    """CheckpointError with the differences if ``folder`` was written for another recipe than ``new``.

    Returns the differences that don't matter but are worth a note, ``key: old -> new`` each.
    """
    before, after = dict(_flat(_completed(old))), dict(_flat(new))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    shown = {key: f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}" for key in changed}
    other = [shown[key] for key in changed if not key.startswith(FREE)]
    if other:
        more = f" and {len(other) - MOST_DIFFERENCES} more" if len(other) > MOST_DIFFERENCES else ""
        differences = ", ".join(other[:MOST_DIFFERENCES]) + more
        raise CheckpointError(
            f"{folder} holds a run of another recipe ({differences})", "set run.folder or --resume never"
        )
    return [shown[key] for key in changed if key.startswith(TOLD) and key != "engine.accumulate"]


def _completed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe that an earlier version wrote, with the fields that have come since at their defaults."""
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def _flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; a list of sections is counted through, and an empty section has no leaves."""
    if isinstance(values, list) and any(isinstance(item, dict) for item in values):
        values = {str(number): item for number, item in enumerate(values)}
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, values


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- the global batch ------------------------------------------------------------------------------------------------


def share_lots(lots: int, world: int, batch_sizes: Sequence[int]) -> tuple[int, int]:
    """How ``world`` processes share a step of ``lots``: the parts that each computes in turn, and into how many pieces
    each lot is cut for that (1: whole), of as many images of each source.

    CheckpointError if there is no way to.
    """
    for pieces in range(1, world + 1):
        if lots * pieces % world == 0 and all(size % pieces == 0 for size in batch_sizes):
            return lots * pieces // world, pieces
    numbers = ", ".join(str(n) for n in range(1, lots + 1) if lots % n == 0)
    sizes = ", ".join(map(str, batch_sizes))
    raise CheckpointError(
        f"a step of this run has {lots} lots of {sizes} images, which {world} processes can't share",
        f"start {numbers} processes",
    )


# -- random states ---------------------------------------------------------------------------------------------------


def _random_file(folder: Path, rank: int) -> Path:
    return folder / f"random-{rank:05d}.safetensors"


def save_random(folder: Path, world: World) -> None:
    """Write the states of this process's generators: torch's, on the CPU and on its GPU.

    Training draws from no others: batches have generators of their own.
    """
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    write_tensors(_random_file(folder, world.rank), states)


def restore_random(folder: Path, world: World, seed: int, step: int) -> None:
    """Set this process's generators as they were; of a process that there was not, they begin at (seed, step, rank)."""
    if not _random_file(folder, world.rank).is_file():
        torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + world.rank) % 2**63)
        return
    states = read_tensors(_random_file(folder, world.rank))
    try:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], world.device)
    except (KeyError, RuntimeError, TypeError) as error:
        file = _random_file(folder, world.rank)
        raise CheckpointError(f"{file} holds no random state: {error}", "name a sound checkpoint") from error


# -- the log ---------------------------------------------------------------------------------------------------------


def forget_later_metrics(file: Path, total: int, evaluated: int | None = None) -> None:
    """Leave out of a log what was written after the checkpoint of step ``total``: it is computed again.

    ``evaluated``: the step of the last evaluation before the checkpoint, which may be the one that stands after it.
    """
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            figures = json.loads(line)
            last = total if evaluated is None or "evaluation" not in figures else evaluated
            if figures["step"] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # the line at which a killed run stopped
            continue
    replace_text(file, "".join(kept))
