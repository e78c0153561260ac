"""Predictions that were stored: read, matched with the records that they answer, scored and compared.

Nothing here opens an image or needs a model. A prediction belongs to the record with its id, or where there is none to
the one with its text on an image of its name; of several alike the first belongs to the first.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mplug_core.data.records import Records
from mplug_core.data.records.finding import read
from mplug_core.data.records.reading import is_number
from mplug_core.data.records.types import KINDS
from mplug_core.errors import DataError
from mplug_core.metrics.intervals import differences, values
from mplug_core.recipe import DataSpec
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.task import EvaluateOptions, Result, mark_right

Row = Mapping[str, Any]


@dataclass
class Matched:
    """Places of the records that have predictions, those in the order that the task scores them in, how many records
    have none, and how many predictions are of no record."""

    places: list[int] = field(default_factory=list)
    predictions: list[Row] = field(default_factory=list)
    without: int = 0
    unknown: int = 0


@dataclass
class Comparison:
    """Another model's metrics on the records that both answered, and by how much this one's are greater, with the
    interval of that; ``n`` records took part."""

    n: int
    metrics: dict[str, float]
    difference: dict[str, tuple[float, float, float]]
    notes: list[str]


def read_unopened(task: str, spec: DataSpec) -> Records[Any]:
    """A task's records, whether their images are there or not; of "reasoning" those of both of its tasks."""
    if task != "reasoning":
        return read(KINDS[task], spec.path, spec.split, spec.format, spec.images, opened=False)
    found, faults = [], []
    for name in ("statements", "entailment"):
        try:
            found.append(read_unopened(name, spec))
        except DataError as error:
            faults.append(error)
    if not found:
        neither = "; ".join(dict.fromkeys(fault.message for fault in faults))
        raise DataError(f"{spec.path} holds neither statements nor entailment: {neither}", faults[0].hint)
    joined = [record for records in found for record in records]
    broken = [error for records in found for error in records.broken]
    return Records(joined, found[0].source, found[0].format, [], broken)


def read_predictions(file: str | Path, task: str) -> list[Row]:
    """The predictions of a task in a file that ``mplug eval --predictions`` wrote; DataError where it is something
    else."""
    hint = "a file that mplug eval --predictions wrote"
    rows = []
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{file}:{number}: expected a JSON object", hint)
                if row.get("task", task) == task:
                    _check(row, task, f"{file}:{number}")
                    rows.append(row)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON Lines", hint) from error
    if not rows:
        raise DataError(f"{file} has no predictions of {task}", hint)
    return rows


_SAID = {
    "caption": "caption", "vqa": "answer", "retrieval": "rank", "grounding": "box", "statements": "label",
    "entailment": "label", "reasoning": "label",
}  # fmt: skip
"""The field of a task's predictions that is scored."""


def _check(row: Row, task: str, where: str) -> None:
    """DataError where a prediction lacks what it is scored or found by."""
    field, hint = _SAID[task], f"is it a prediction of {task}?"
    value = row.get(field)
    if task == "grounding":
        if not _numbers(value, 4) or not _numbers(size := row.get("size"), 2) or min(size) <= 0:
            raise DataError(f'{where}: expected "box" in pixels and the "size" of its picture', hint)
    elif task == "retrieval":
        if not _numbers([value], 1) or not isinstance(row.get("truth"), list):
            raise DataError(f'{where}: expected "rank", a number, and "truth", a list', hint)
    elif not isinstance(value, str):
        raise DataError(f'{where}: expected "{field}", a text', hint)
    sure = row.get("confidence")  # null where there is none
    if sure is not None and not (_numbers([sure], 1) and 0 <= sure <= 1):
        raise DataError(f'{where}: expected "confidence" between 0 and 1', hint)
    if not _keys(row, task):
        raise DataError(f"{where}: nothing says which record it answers", hint)


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(is_number, value))


def _keys(fields: Row, task: str) -> list[Hashable]:
    """What tells a record apart, by the fields that a prediction has of it: its id, and its text with its images."""
    if task == "reasoning":
        task = "entailment" if "hypothesis" in fields else "statements"
    if task == "retrieval" and "text" in fields:
        return [("text", fields["text"], *_names(fields["truth"][:1]))]
    keys: list[Hashable] = []
    if (identifier := fields.get(TASKS[task].identifier)) not in (None, ""):
        keys.append(("id", str(identifier)))
    if images := fields.get("images") or ([fields["image"]] if fields.get("image") else []):
        keys.append(("images", fields.get(TASKS[task].text), *_names(images)))
    return keys


def _names(images: Sequence[str]) -> list[str]:
    """Files' names: the folder may be called otherwise on another day."""
    return [Path(str(image)).name for image in images]


def match(task: str, records: Sequence[Any], rows: Sequence[Row]) -> Matched:
    """Records with their predictions, in the order of the records."""
    waiting: dict[Hashable, list[Row]] = defaultdict(list)
    for row in reversed(rows):
        waiting[_keys(row, task)[0]].append(row)

    def take(fields: Row) -> Row | None:
        for key in _keys(fields, task):
            if waiting[key]:
                return waiting[key].pop()
        return None

    found, captions, used = Matched(), [], 0
    for place, record in enumerate(records):
        identity = TASKS[task].identity(record)
        taken = [take(identity)]
        if task == "retrieval":
            taken += [take({"text": text, "truth": [identity["image"]]}) for text in record.captions]
        used += sum(row is not None for row in taken)
        if None in taken:
            continue
        found.places.append(place)
        found.predictions.append(taken[0])
        captions += taken[1:]
    found.predictions += captions  # of retrieval they follow all images
    found.without, found.unknown = len(records) - len(found.places), len(rows) - used
    return found


def stored_result(task: str, spec: DataSpec, file: str | Path, options: EvaluateOptions = EvaluateOptions()) -> Result:
    """The evaluation of the predictions in a file on the records of ``spec``.

    Records that the file does not answer are among the skipped, as broken ones are.
    """
    began = time.perf_counter()
    rows, chosen = read_predictions(file, task), TASKS[task]
    found = read_unopened(task, spec)
    asked = found.records[: options.limit]
    matched = match(task, asked, rows)
    if not matched.places:
        raise DataError(
            f"{file} answers none of the {len(asked)} records of {spec.path}", "name the data of its answers"
        )
    records = [asked[place] for place in matched.places]
    predictions = [dict(row) for row in matched.predictions]
    measures, notes = chosen.score(records, predictions, found.source)
    if matched.without:
        notes.append(f"{matched.without} of {len(asked)} records have no answer in {file}")
    if matched.unknown and options.limit is None:
        notes.append(f"{matched.unknown} answers in {file} are of no record of {spec.path}")
    for record, prediction in zip(records, predictions, strict=task != "retrieval"):
        prediction.pop("task", None)
        prediction.update(chosen.truth(record))
    mark_right(chosen, records, predictions)
    return Result(
        task, len(records), matched.without + len(found.broken), values(measures), time.perf_counter() - began,
        predictions, notes, measures, records, found.source,
    )  # fmt: skip


def compare(task: str, result: Result, rows: Sequence[Row], file: str | Path) -> Comparison:
    """An evaluation against another model's predictions of the same records, those of ``file``.

    Records that one of the two lacks are left out, and counted in a note; DataError as :func:`match_both` says.
    """
    matched, notes = match_both(task, result.records, rows, file)
    records, own = [result.records[place] for place in matched.places], result.measures
    if matched.without:
        own, _ = TASKS[task].score(records, [result.predictions[place] for place in matched.places], result.source)
    theirs, _ = TASKS[task].score(records, matched.predictions, result.source)
    return Comparison(len(records), values(theirs), differences(own, theirs), notes)


def match_both(task: str, records: Sequence[Any], rows: Sequence[Row], file: str | Path) -> tuple[Matched, list[str]]:
    """Records with another model's predictions, and a line on each kind of those that only one of the two has.

    DataError where none is left, and for retrieval where one is left out: its ranks are among all that was searched.
    """
    matched = match(task, records, rows)
    notes = []
    if matched.without:
        notes.append(f"{matched.without} of {len(records)} records have no answer in {file}: not compared")
    if matched.unknown:
        notes.append(f"{matched.unknown} answers in {file} are of records that were not answered here: not compared")
    if not matched.places:
        raise DataError(f"{file} answers none of the {len(records)} records", "compare answers to the same data")
    if task == "retrieval" and notes:
        raise DataError(f"retrieval can't be compared: {notes[0]}", "search the same images and captions with both")
    return matched, notes
