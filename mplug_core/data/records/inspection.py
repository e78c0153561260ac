"""What is understood of a path: which tasks it serves, in which format, and what is missing or broken in it.

``mplug data inspect`` shows this. Images that are not there are counted, and their records are looked at all the same.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mplug_core.data.records.files import File, is_file
from mplug_core.data.records.finding import NotHere, find, sources
from mplug_core.data.records.reading import Reading, Source, read_records, selection
from mplug_core.data.records.types import KINDS, Record, images_of
from mplug_core.errors import DataError

TASKS = ("caption", "vqa", "grounding", "statements", "entailment")
"""A task for each kind of records; retrieval and pretrain read captions, too."""

_SHOWN = 10
_EXAMPLES = 3
# What the own format calls the text of each kind; ALBEF's lists say "sentence".
_FIELDS = {
    "captions": ("caption",),
    "questions": ("question",),
    "phrases": ("phrase",),
    "statements": ("statement", "sentence"),
    "entailments": ("hypothesis", "sentence"),
}
_TEXTS = {"captions": "captions", "questions": "question", "phrases": "phrase", "statements": "statement"}


@dataclass
class SplitView:
    """One split: records with and without their images, and what is wrong. ``split`` is "" where there is one file."""

    split: str
    source: str
    format: str
    records: int
    usable: int
    images: int
    missing: int
    broken: int
    first_missing: list[str] = field(default_factory=list)
    first_broken: list[str] = field(default_factory=list)


@dataclass
class TaskView:
    """What a path has for one task, over all of the ``splits`` that were looked at.

    ``histogram`` counts the most frequent answers, labels, phrases or domains; ``words`` has the shortest, mean and
    longest text.
    """

    task: str
    kind: str
    splits: list[SplitView]
    histogram: dict[str, int]
    distinct: int
    words: dict[str, float]
    examples: list[dict[str, Any]]
    faults: list[str] = field(default_factory=list)


@dataclass
class Inspection:
    """All tasks that a path can serve."""

    path: str
    tasks: list[TaskView]

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect(
    path: str | Path,
    task: str | None = None,
    split: str | None = None,
    format: str | None = None,
    images: str | Path | None = None,
) -> Inspection:
    """Look into ``path`` for ``task``, or for every task; of all splits if none is named.

    Raises DataError where nothing is understood: the error of the task that the files look most like.
    """
    views: list[TaskView] = []
    errors: list[DataError] = []
    for name in (task,) if task else TASKS:
        try:
            view = _view(name, Path(path), split, format, images, asked=task is not None)
        except DataError as error:
            errors.append(error)
            continue
        if view is not None:
            views.append(view)
    if views:
        return Inspection(str(path), views)
    if task or not (os.path.exists(path) or is_file(Path(path))):
        raise errors[0] if errors else DataError(f"nothing in {path} is understood as {KINDS[task or TASKS[0]]}")
    raise _nothing(path, errors)


def _nothing(path: str | Path, errors: list[DataError]) -> DataError:
    """The error of a task that the files look like; otherwise one that fits all."""
    for error in errors:
        if not isinstance(error, NotHere):
            return error
    return DataError(
        f"nothing in {path} is understood",
        "expected records of caption, vqa, grounding, statements or entailment in one of the layouts of docs/data.md",
    )


def _view(
    task: str, path: Path, split: str | None, format: str | None, images: str | Path | None, asked: bool
) -> TaskView | None:
    """The view of one task; None where its files are another task's."""
    kind = KINDS[task]
    named, chosen = selection(split)
    wrong: list[DataError] = []
    found = {named or "": find(kind, path, named, format)} if named is not None else sources(kind, path, format, wrong)
    if not found and asked:
        raise NotHere(f"there are no {kind} in the folder {path}", f"expected {kind}.jsonl there; or name the file")
    splits: list[SplitView] = []
    records: list[Record] = []
    faults = [error.message for error in wrong]
    for name, source in found.items():
        if not asked and not claims(kind, source):
            continue
        try:
            reading = Reading(source, images)
            read = read_records(reading, chosen, keep=True)
        except DataError as error:
            if len(found) == 1 and not wrong:
                raise
            faults.append(error.message)
            continue
        splits.append(_split_view(name, reading, read))
        records += read
    if not splits:
        if faults:
            raise DataError(faults[0])
        return None
    if not records:
        broken = [first for view in splits for first in view.first_broken]
        raise DataError(broken[0] if broken else f"{splits[0].source} has no {kind}", "correct it")
    return _summary(task, kind, splits, records, faults)


def claims(kind: str, source: Source) -> bool:
    """Whether a file in the own format has records of this kind: by the name of the text's field."""
    if source.layout.name not in ("jsonl", "json"):
        return True
    try:
        values = source.file.sample
    except DataError:
        return True
    keys = set(values) if values else _keys_in_head(source.file)
    if "sentence" in keys and keys.isdisjoint({"statement", "hypothesis"}):
        # a sentence on two images, or with a label that is no truth value
        true_or_false = str(values.get("label")).lower() in ("true", "false", "none") or "images" in keys
        return kind == ("statements" if true_or_false else "entailments")
    return any(name in keys for name in _FIELDS[kind])


def _keys_in_head(file: File) -> set[str]:
    """The fields that a file seems to have, where its first lines are broken."""
    return {name for names in _FIELDS.values() for name in names if f'"{name}"'.encode() in file.head}


def _split_view(name: str, reading: Reading, records: list[Any]) -> SplitView:
    missing = reading.missing
    gone = set(missing)
    images = {image for record in records for image in images_of(record)}
    return SplitView(
        split=name,
        source=str(reading.path),
        format=reading.format,
        records=len(records),
        usable=sum(gone.isdisjoint(images_of(record)) for record in records),
        images=len(images - gone),
        missing=len(missing),
        broken=len(reading.broken),
        first_missing=[str(image) for image in missing[:3]],
        first_broken=[error.message for error in reading.broken[:5]],
    )


def _summary(task: str, kind: str, splits: list[SplitView], records: list[Any], faults: list[str]) -> TaskView:
    counts: Counter[str] = Counter()
    lengths: list[int] = []
    for record in records:
        counts.update(_values(kind, record))
        texts = getattr(record, _TEXTS.get(kind, "hypothesis"))
        lengths += [len(text.split()) for text in ((texts,) if isinstance(texts, str) else texts)]
    words = {"shortest": min(lengths), "mean": round(sum(lengths) / len(lengths), 1), "longest": max(lengths)}
    examples = [example_of(record) for record in records[:_EXAMPLES]]
    return TaskView(
        task, kind, splits, dict(counts.most_common(_SHOWN)), len(counts), words, examples, faults
    )  # fmt: skip


def _values(kind: str, record: Any) -> tuple[str, ...]:
    """What the histogram counts."""
    if kind == "captions":
        return (record.domain,) if record.domain else ()
    if kind == "questions":
        return record.answers
    if kind == "phrases":
        return (record.phrase,)
    if record.label is None:
        return ("hidden",)
    return (str(record.label).lower(),)


def example_of(record: Any) -> dict[str, Any]:
    """The fields that are not empty, as JSON can have them."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: _plain(value) for name, value in values.items() if value not in ("", (), None)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 4)
    return str(value) if isinstance(value, Path) else value
