"""What a model has to beat: answers that don't look at the image asked about, or don't look at the question.

- ``nearest`` (caption): the caption of the most similar training photo, by the model's own features
- ``majority`` (vqa, statements, entailment): the most frequent answer or label of the training records
- ``prior`` (vqa): the most frequent answer to training questions with the same first words
- ``constant_box`` (grounding): the one box that is right for most training phrases
- ``random`` (retrieval): what an arbitrary order finds, expected
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from mplug_core.data.text import clean_caption
from mplug_core.errors import DataError, UsageError
from mplug_core.metrics.grounding import RIGHT
from mplug_core.metrics.intervals import Array, Measure, values
from mplug_core.metrics.retrieval import CUTS, recall_measures
from mplug_core.recipe import DataSpec, nearest
from mplug_core.tasks.caption import scene_graphs
from mplug_core.tasks.grounding import pixels
from mplug_core.tasks.nearest import nearest_captions
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.retrieval import owners_of, right_answers
from mplug_core.tasks.stored import read_unopened
from mplug_core.tasks.task import EvaluateOptions, Ready, Result
from mplug_core.tasks.vqa import weighted_answers

FIRST_WORDS = 3
"""Words of a question that tell its kind: "how many of"; fewer where no training question begins so."""

TRIED, STARTS = 2000, 6
"""Training boxes that are compared with each other, and the best of them that are moved."""
STEPS = (0.04, 0.02, 0.01, 0.005)
_MOVES = np.array([
    [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, -1, 0], [0, 1, 0, -1],
    [1, 1, -1, -1],
])  # fmt: skip
_MOVES = np.concatenate([_MOVES, -_MOVES]).astype(np.float64)


Rows = list[dict[str, Any]]
"""What a baseline says of each record, in the form of the task's predictions."""


def baseline(
    name: str,
    task: str,
    train: DataSpec | None,
    spec: DataSpec,
    options: EvaluateOptions = EvaluateOptions(),
    ready: Ready | None = None,
    records: Sequence[Any] | None = None,
) -> Result:
    """Score baseline ``name`` of ``task`` on ``spec``, or on those of its records that are given: what a model has
    answered.

    ``train``: the records that it repeats, which ``random`` doesn't need; ``ready``: the model, which only ``nearest``
    needs. The others open no image, and none has to be there. UsageError for a task that has no such baseline.
    """
    known = BASELINES.get(task, {})
    if name not in known:
        raise UsageError(
            f"{task} has no baseline {name!r}{nearest(name, known)}", f"it has {', '.join(known) or 'none'}"
        )
    if name == "nearest":
        assert train is not None and ready is not None
        return nearest_captions(ready, train, spec, options)
    began = time.perf_counter()
    chosen, asked = TASKS[task], read_unopened(task, spec)
    if records is None:
        records = asked.records[: options.limit]
    learned = read_unopened(task, train).records if train is not None else []
    if name == "random":
        measures, notes, predictions = random_order(records, asked.source), [], []
    else:
        said = known[name](learned, records)
        predictions = [chosen.identity(r) | row | chosen.truth(r) for r, row in zip(records, said, strict=True)]
        measures, notes = chosen.score(records, predictions, asked.source)
    seconds = time.perf_counter() - began
    return Result(
        name, len(records), len(asked.broken), values(measures), seconds, predictions, notes, measures, list(records),
        asked.source,
    )  # fmt: skip


def majority_answer(learned: Sequence[Any], records: Sequence[Any]) -> Rows:
    """The answer with the greatest weight, to all questions."""
    answer = _most_frequent(_answers(learned))
    return [{"answer": answer} for _ in records]


def prior_answer(learned: Sequence[Any], records: Sequence[Any]) -> Rows:
    """The most frequent answer to questions that begin with the same words, as many of them as were ever seen."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for record in learned:
        # one without an answer has nothing to repeat, but all of them together are still a fault
        for start in _starts(record.question) if record.answers else ("",):
            groups[start].append(record)
    best = {start: _most_frequent(_answers(group)) for start, group in groups.items()}
    return [{"answer": next(best[start] for start in _starts(r.question) if start in best)} for r in records]


def _starts(question: str) -> list[str]:
    """The first words of a question, the longest beginning first, the empty one last."""
    words = question.lower().split()[:FIRST_WORDS]
    return [" ".join(words[:count]) for count in range(len(words), -1, -1)]


def _answers(records: Sequence[Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for record in records:
        for answer, weight in weighted_answers(record) if record.answers else ():
            counts[answer] += weight
    return counts


def _most_frequent(counts: Counter[str]) -> str:
    """The greatest; of equal ones the first in the alphabet."""
    if not counts:
        raise DataError("the training records have no answers or labels to repeat", "--train names records with them")
    return min(counts, key=lambda text: (-counts[text], text))


def majority_label(learned: Sequence[Any], records: Sequence[Any]) -> Rows:
    """The most frequent label, on everything."""
    label = _most_frequent(Counter(_label(r) for r in learned if r.label is not None))
    return [{"label": label} for _ in records]


def _label(record: Any) -> str:
    return str(record.label).lower()


def constant_box(learned: Sequence[Any], records: Sequence[Any]) -> Rows:
    """The one box that is right for most training phrases, at an IoU of 0.5."""
    best = best_box(np.array([record.box for record in learned]))
    return [{"box": pixels(record, best)} for record in records]


def best_box(boxes: Array) -> list[float]:
    """The box that overlaps most of ``boxes`` [n, 4], corners in shares, by half or more.

    The boxes themselves are tried, of many a part that is spread evenly; then the best of them are moved and scaled as
    long as more boxes are met.
    """
    tried = boxes[np.linspace(0, len(boxes) - 1, min(TRIED, len(boxes))).astype(int)]
    overlaps = _overlaps(tried, tried)
    order = np.argsort(-((overlaps >= RIGHT).sum(1) + overlaps.mean(1)), kind="stable")
    starts = tried[order[:STARTS]]
    found = [_climb(start, met, boxes) for start, met in zip(starts, _met(starts, boxes), strict=True)]
    return max(found, key=lambda pair: pair[1])[0].tolist()


def _climb(box: Array, met: int, boxes: Array) -> tuple[Array, int]:
    """A box moved by ever smaller steps while that meets more boxes, and how many it meets."""
    for step in STEPS:
        while True:
            moved = np.clip(box + step * _MOVES, 0.0, 1.0)
            moved = moved[(moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])]
            counts = _met(moved, boxes)
            if not len(moved) or counts.max() <= met:
                break
            box, met = moved[counts.argmax()], int(counts.max())
    return box, met


def _met(candidates: Array, boxes: Array) -> Array:
    """How many boxes each candidate overlaps by half or more."""
    return (_overlaps(candidates, boxes) >= RIGHT).sum(1)


def _overlaps(one: Array, other: Array) -> Array:
    """IoU of every box [n, 4] with every other [m, 4]."""
    return box_iou(torch.from_numpy(one), torch.from_numpy(other)).numpy()


def random_order(records: Sequence[Any], source: Path) -> dict[str, Measure]:
    """Recall at k of an order by lot, on average: 1 - C(n - r, k) / C(n, k) for r right ones among n."""
    cleaned = [clean_caption(text) for record in records for text in record.captions]
    texts_of, images_of = right_answers(
        cleaned, [len(record.captions) for record in records], by_words=scene_graphs(source) is not None
    )
    chances = [
        [
            [1 - comb(count - len(answers), min(k, count)) / comb(count, min(k, count)) for k in CUTS]
            for answers in right
        ]
        for right, count in ((texts_of, len(cleaned)), (images_of, len(records)))
    ]
    return recall_measures(*map(np.array, chances), *owners_of(records))


BASELINES: dict[str, dict[str, Callable[[Sequence[Any], Sequence[Any]], Rows] | None]] = {
    "caption": {"nearest": None},
    "vqa": {"majority": majority_answer, "prior": prior_answer},
    "retrieval": {"random": None},
    "grounding": {"constant_box": constant_box},
    "statements": {"majority": majority_label},
    "entailment": {"majority": majority_label},
}
"""Of each task its baselines; None: it says nothing of single records, or is made with the model."""
