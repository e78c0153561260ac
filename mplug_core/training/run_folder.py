"""Whose a run folder is: a run writes into a new or empty folder, or into its own, which a marker tells.

Folders of earlier versions have no marker; they are known by their recipe together with a log, events or checkpoints.
What others have put into a folder is never removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from mplug_core.atomic import replace_text
from mplug_core.bounded import Unreadable, open_regular, parse_json, read_up_to
from mplug_core.errors import MplugError, UsageError
from mplug_core.json_text import to_json
from mplug_core.outputs import PROBE, path_shown, require_writable, unwritable
from mplug_core.recipe import Recipe, read_yaml

MARKER, FORMAT, VERSION = "run.json", "mplug run", 1
RUN, TRY, EXPERIMENT = "run", "try", "experiment"
"""What a folder is of: a run, a try (which starts anew each time), or the runs of an experiment."""
EARLY = ("scenes", "features")
"""What a run may write before its recipe."""
OWN = (
    "recipe.yaml", "vocab.txt", "metrics.jsonl", "events.jsonl", "trackers.json", "checkpoints", "model", "best",
    "tensorboard", "wandb", *EARLY,
)  # fmt: skip
"""What a run writes, beside the marker and a file for each aligning stage."""
ELSEWHERE = "name a new or empty folder: run.folder=FOLDER"
MOST_BYTES = 1 << 20
"""Of a line or a recipe that is read to tell whose a folder is."""


def try_folder(recipe: Recipe) -> Path:
    """Where a try of a recipe writes."""
    folder = recipe.run_folder
    return folder.with_name(f"{folder.name}-try")


def check_run_folder(folder: Path, kind: str = RUN, hint: str = ELSEWHERE) -> None:
    """UsageError unless ``folder`` is new, empty, or of ``kind``; MplugError where it can't be written. Writes
    nothing."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)  # tells of names that are too long, and of files on the way
        if not os.path.isdir(folder):
            if os.path.lexists(folder):
                raise UsageError(f"{path_shown(folder)} is a file", hint)
        elif (names := _listed(folder)) and kind not in kinds_of(folder):
            known = kinds_of(folder)
            why = f"it holds {names[0]}" if not known else f"it is of another kind ({known[0]})"
            raise UsageError(f"{path_shown(folder)} is not of a run, and is left as it is: {path_shown(why)}", hint)
    except (OSError, ValueError) as error:
        raise unwritable(folder, error, hint) from error
    require_writable(folder, hint)


def _listed(folder: Path) -> list[str]:
    """What is in a folder, but for what another process of the run, or one that was killed, has begun to write."""
    begun = (PROBE, f".{MARKER}-")
    return sorted(name for name in os.listdir(folder) if not name.startswith(begun))


def claim(folder: Path, kind: str = RUN) -> None:
    """Make a folder one of ``kind``, if it may be (see :func:`check_run_folder`)."""
    check_run_folder(folder, kind)
    if _marked(folder) == kind:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / MARKER, to_json({"format": FORMAT, "version": VERSION, "kind": kind}) + "\n")
    except OSError as error:
        raise unwritable(folder, error, ELSEWHERE) from error


def kinds_of(folder: Path) -> tuple[str, ...]:
    """What a folder may be used as; nothing where it isn't ours."""
    marked = _marked(folder)
    if marked is not None:
        return (TRY, RUN) if marked == TRY else (marked,)
    if _is_older_run(folder):
        return (RUN, TRY) if _was_tried(folder) else (RUN,)
    return (EXPERIMENT,) if (folder / "shared").is_dir() and RUN in kinds_of(folder / "shared") else ()


def refuse_own_start(folder: Path, start: str | None) -> None:
    """UsageError where a run that starts anew in this folder would write over the model that it starts from."""
    if start and holds_model(folder, start):
        raise UsageError(f"start.model {start} is in the run folder, which is written anew", "set run.folder")


def holds_model(folder: Path, path: str) -> bool:
    """Whether a path is that of a run, or of a model that the run in this folder has written."""
    place, run = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return place == run or any(place.is_relative_to(run / name) for name in ("model", "best", "checkpoints"))


def clear(folder: Path, stages: Iterable[str] = ()) -> None:
    """Remove all that a run with these stages has written; UsageError where the folder is not of a try."""
    check_run_folder(folder, TRY, "move it away, or set run.folder")
    if not folder.is_dir():
        return
    claim(folder, TRY)  # where a kill comes amid it, it is a try's all the same
    for name in (*OWN, *(f"{stage}.safetensors" for stage in stages)):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if set(os.listdir(folder)) <= {MARKER}:
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()


def _marked(folder: Path) -> str | None:
    values = _read_json(folder / MARKER)
    kind = values.get("kind") if values.get("format") == FORMAT else None
    return kind if kind in (RUN, TRY, EXPERIMENT) else None


def _is_older_run(folder: Path) -> bool:
    """Whether a version without markers has run here."""
    names = set(_listed(folder))
    if names and names <= set(EARLY):  # it was stopped early
        return all(_is_early(folder / name) for name in names)
    if _first(folder / "events.jsonl").keys() >= {"event", "time", "step", "resumed", "pid", "host"}:
        return True
    if not {"name", "data", "objectives", "optimizer", "run"} <= _recipe(folder).keys():
        return False
    checkpoints = (folder / "checkpoints").glob("step-*/meta.json")
    return _first(folder / "metrics.jsonl").keys() >= {"step", "stage"} or any(
        _read_json(file).keys() >= {"progress", "recipe"} for file in checkpoints
    )


def _is_early(path: Path) -> bool:
    if path.name == "scenes":
        return (path / "scenes.json").is_file() or (path / ".building").is_dir()
    return path.is_dir() and all(file.suffix == ".npy" or file.name.startswith(".") for file in path.iterdir())


def _was_tried(folder: Path) -> bool:
    """Whether a run of a version without markers was a try, by what tries set."""
    run = _recipe(folder).get("run")
    if not isinstance(run, dict):  # nothing was saved yet
        return not any((folder / name).exists() for name in ("checkpoints", "model", "best"))
    tried = {"log_every": 1, "keep": 1, "evaluate_every": 0, "patience": 0, "trackers": []}
    return all(run.get(key) == value for key, value in tried.items())


def _recipe(folder: Path) -> dict[str, Any]:
    file = folder / "recipe.yaml"
    try:
        return read_yaml(file) if file.is_file() and file.stat().st_size < MOST_BYTES else {}
    except (OSError, MplugError, RecursionError, ValueError):
        return {}


def _read_json(file: Path) -> dict[str, Any]:
    return _mapping(file, lambda stream: read_up_to(stream, MOST_BYTES))


def _first(file: Path) -> dict[str, Any]:
    """The first line of a JSON Lines file."""
    return _mapping(file, lambda stream: stream.readline(MOST_BYTES))


def _mapping(file: Path, read: Callable[[IO[bytes]], bytes]) -> dict[str, Any]:
    """The JSON mapping that is read of a file; empty where there is none."""
    try:
        with open_regular(file) as stream:
            values = parse_json(read(stream))
    except (OSError, Unreadable):
        return {}
    return values if isinstance(values, dict) else {}
