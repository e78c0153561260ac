"""A folder of scenes: three splits of images and JSON Lines, written by any number of processes to the same bytes.

The splits are built in a hidden folder inside by the folder's one writer, and take the place of what is there when they
are complete; ``scenes.json`` marks a folder as ours. Records of a couple of images (2i, 2i + 1) come together, so that
statements share images with the rest.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mplug_core.atomic import BUILDING, HIDDEN, finish_replacing, is_being_replaced, replace_contents, sole_writer
from mplug_core.bounded import Unreadable, read_json
from mplug_core.errors import DataError, UsageError
from mplug_core.json_text import to_json
from mplug_core.outputs import path_shown

from .captions import captions
from .entailments import entailments
from .phrases import phrases
from .questions import questions
from .render import render
from .statements import statements
from .world import SPLIT_NAMES, WORLD, WORLDS, Scene, World, sample_scene, stream

SPLITS = SPLIT_NAMES
KINDS = ("captions", "questions", "phrases", "statements", "entailments", "scenes")
MARKER = "scenes.json"
VERSION = 2
"""Of the texts: the same seed has other ones in another version. Folders of all versions are read."""
_CHUNK = 64  # scenes a worker makes at a time; even, so that couples stay together

Records = dict[str, list[dict[str, Any]]]


def split_sizes(n: int) -> dict[str, int]:
    """How many scenes each split has for ``n`` training scenes."""
    return {"train": n, "val": max(100, n // 20), "held_out": max(100, n // 20)}


def image_name(index: int) -> str:
    return f"images/{index:06d}.jpg"


def write_scenes(
    out: str | Path,
    n: int,
    seed: int = 0,
    size: int = 96,
    workers: int = 1,
    world: World = WORLD,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Write ``n`` training scenes and the other two splits to ``out``; returns records per split and kind.

    An existing scenes folder is replaced when the new scenes are whole; any other folder that is not empty raises
    UsageError, and MplugError one in which another process writes. ``progress`` is called with the number of scenes
    just done.
    """
    out = Path(out)
    if n < 1 or seed < 0 or workers < 1:
        raise UsageError("n and workers must be at least 1 and seed at least 0")
    if not 32 <= size <= 1024:
        raise UsageError(f"no scenes of {size} pixels", hint="a size from 32 to 1024")
    try:
        _check_target(out)
        with sole_writer(out):
            finish_replacing(out, _is_ours, MARKER)
            _check_target(out)
            return _build(out, n, seed, size, workers, world, progress)
    except OSError as error:
        raise DataError(
            f"can't write scenes to {path_shown(out)}: {error.strerror or error}",
            hint="check permissions and free space",
            code="write",
        ) from error


def holds_scenes(out: str | Path, n: int, seed: int, size: int) -> bool:
    """Whether :func:`write_scenes` has written these scenes of the full world to ``out``, all, and as it does now."""
    try:
        about = read_json(Path(out) / MARKER)
    except Unreadable:
        return False
    if not isinstance(about, dict) or about.get("world", "full") != "full":
        return False
    return [about.get(key) for key in ("version", "n", "seed", "size")] == [VERSION, n, seed, size]


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", hint="name a folder")
    try:
        entries = {p.name for p in out.iterdir()} if out.exists() else set()
    except OSError as error:
        raise UsageError(f"can't read {out}: {error.strerror}", hint="name another folder") from error
    if MARKER not in entries and entries - HIDDEN and not _was_interrupted(out, entries):
        raise UsageError(
            f"{out} is not empty and holds no scenes ({MARKER} is missing)", hint="name a new or empty folder"
        )


def _is_ours(name: str) -> bool:
    return name in SPLITS or name == MARKER


def _was_interrupted(out: Path, entries: set[str]) -> bool:
    """Whether a folder without the marker is one that was being replaced when a kill came."""
    if is_being_replaced(out, MARKER):
        return True
    if entries - HIDDEN - set(SPLITS):
        return False
    # earlier versions took the marker away first
    made = any((out / BUILDING / split / "images").is_dir() for split in SPLITS)
    return made or all((out / name / "scenes.jsonl").is_file() for name in entries - HIDDEN)


def _build(
    out: Path, n: int, seed: int, size: int, workers: int, world: World, progress: Callable[[int], None] | None
) -> dict[str, dict[str, int]]:
    building = out / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    totals: dict[str, dict[str, int]] = {}
    try:
        for split, count in split_sizes(n).items():
            (building / split / "images").mkdir(parents=True)
            chunks = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
            work = partial(_write_chunk, building / split, seed, split, size, world)
            files = {kind: (building / split / f"{kind}.jsonl").open("w", encoding="utf-8") for kind in KINDS}
            lines: Counter[str] = Counter()
            try:
                for (start, end), records in zip(chunks, _results(work, chunks, workers), strict=True):
                    for kind in KINDS:
                        files[kind].writelines(to_json(r) + "\n" for r in records[kind])
                        lines[kind] += len(records[kind])
                    if progress is not None:
                        progress(end - start)
            finally:
                for file in files.values():
                    file.close()
            totals[split] = dict(lines)
        name = next((name for name, known in WORLDS.items() if known is world), None)
        about = {"format": "mplug scenes", "version": VERSION, "n": n, "seed": seed, "size": size, "world": name}
        about["records"] = totals
        (building / MARKER).write_text(to_json(about, indent=2) + "\n", encoding="utf-8")
        replace_contents(building, out, _is_ours, MARKER)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return totals


def _results(
    work: Callable[[tuple[int, int]], Records], chunks: list[tuple[int, int]], workers: int
) -> Iterator[Records]:
    """Chunks' records in order."""
    if workers == 1 or len(chunks) == 1:
        yield from map(work, chunks)
        return
    # Fresh processes: a copy of a process in which torch runs threads can hang.
    with ProcessPoolExecutor(min(workers, len(chunks)), get_context("spawn"), initializer=_leave_interrupts) as pool:
        try:
            yield from pool.map(work, chunks)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that draws scenes was killed", hint="use fewer --workers", code="write"
            ) from error


def _leave_interrupts() -> None:
    """Ctrl-C is the main process' business; it ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_chunk(folder: Path, seed: int, split: str, size: int, world: World, span: tuple[int, int]) -> Records:
    """Images of scenes ``span`` to files; their records to the caller, who writes them in order."""
    records: Records = {kind: [] for kind in KINDS}
    couple: list[Scene] = []
    for index in range(*span):
        scene = sample_scene(seed, split, index, world)
        name = image_name(index)
        picture = render(scene, size, (seed, SPLITS.index(split), index, 1), world)
        picture.save(folder / name, quality=95, subsampling=0)  # a third of a PNG, and read faster
        rng = stream(seed, split, index, "text")
        records["scenes"].append(scene.to_record(name, size))
        records["captions"].append({"image": name, "caption": captions(scene, rng, world)})
        for question, answer, kind in questions(scene, rng, world):
            records["questions"].append({"image": name, "question": question, "answer": answer, "kind": kind})
        for phrase, box in phrases(scene, rng, world):
            pixels = [round(v * size, 1) for v in box]
            records["phrases"].append({"image": name, "phrase": phrase, "box": pixels, "size": [size, size]})
        for hypothesis, label in entailments(scene, rng, world):
            records["entailments"].append({"image": name, "hypothesis": hypothesis, "label": label})
        couple.append(scene)
        if index % 2:
            names = [image_name(index - 1), name]
            for statement, label in statements(*couple, stream(seed, split, index, "couple"), world):
                records["statements"].append({"images": names, "statement": statement, "label": label})
            couple = []
    return records


def read_scenes(path: str | Path) -> list[tuple[Path, Scene]]:
    """Image and scene graph of each line of a scenes.jsonl; DataError names file and line of a broken one."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read {path}", hint="make it with: mplug data scenes OUT --n N") from error
    found = []
    folder = path.parent.absolute()  # as the readers of records name images: the same image has one name
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found.append((folder / record["image"], Scene.from_record(record, path.parent.name)))
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError, AttributeError) as error:
            raise DataError(f"{path}:{number} is no scene: {type(error).__name__} {error}") from error
    return found
