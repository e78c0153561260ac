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
from typing import Any

import torch
from torchvision.ops import box_iou

from mplug_core.data.text import clean_caption
from mplug_core.errors import DataError, UsageError
from mplug_core.metrics.grounding import score_boxes
from mplug_core.metrics.reasoning import score_labels
from mplug_core.metrics.retrieval import CUTS
from mplug_core.metrics.vqa import score_answers
from mplug_core.recipe import DataSpec, nearest
from mplug_core.tasks.nearest import nearest_captions
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.retrieval import right_answers
from mplug_core.tasks.task import EvaluateOptions, Ready, Result
from mplug_core.tasks.vqa import weighted_answers

FIRST_WORDS = 3
"""Words of a question that tell its kind: "how many of"; fewer where no training question begins so."""

BOXES = 2000
"""Training boxes that are compared with each other."""


def baseline(
    name: str,
    task: str,
    train: DataSpec | None,
    spec: DataSpec,
    options: EvaluateOptions = EvaluateOptions(),
    ready: Ready | None = None,
) -> Result:
    """Score baseline ``name`` of ``task`` on ``spec``. ``train``: the records that it repeats, which ``random`` doesn't
    need; ``ready``: the model, which only ``nearest`` needs. UsageError for a task that has no such baseline.
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
    asked = TASKS[task].read(spec)
    records = asked.records[: options.limit]
    learned = TASKS[task].read(train).records if train is not None else []
    metrics, predictions = known[name](learned, records)
    skipped = len(asked.missing) + len(asked.broken)
    return Result(name, len(records), skipped, metrics, time.perf_counter() - began, predictions)


Scored = tuple[dict[str, float], list[dict[str, Any]]]


def majority_answer(learned: Sequence[Any], records: Sequence[Any]) -> Scored:
    """The answer with the greatest weight, to all questions."""
    said = [_most_frequent(_answers(learned))] * len(records)
    return _score_answers(said, records)


def prior_answer(learned: Sequence[Any], records: Sequence[Any]) -> Scored:
    """The most frequent answer to questions that begin with the same words, as many of them as were ever seen."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for record in learned:
        # one without an answer has nothing to repeat, but all of them together are still a fault
        for start in _starts(record.question) if record.answers else ("",):
            groups[start].append(record)
    best = {start: _most_frequent(_answers(group)) for start, group in groups.items()}
    said = [next(best[start] for start in _starts(record.question) if start in best) for record in records]
    return _score_answers(said, records)


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


def _score_answers(said: list[str], records: Sequence[Any]) -> Scored:
    listed = [{"question": r.question, "answer": a} for a, r in zip(said, records, strict=True)]
    return score_answers(said, records), listed


def majority_label(learned: Sequence[Any], records: Sequence[Any]) -> Scored:
    """The most frequent label, on everything."""
    label = _most_frequent(Counter(_label(r) for r in learned if r.label is not None))
    per_label = bool(records) and hasattr(records[0], "hypothesis")
    truth = [None if r.label is None else _label(r) for r in records]
    groups = [getattr(r, "group", "") for r in records]
    return score_labels([label] * len(records), truth, groups, per_label), [{"label": label} for _ in records]


def _label(record: Any) -> str:
    return str(record.label).lower()


def constant_box(learned: Sequence[Any], records: Sequence[Any]) -> Scored:
    """Of the training boxes the one whose IoU is 0.5 or more with the most others."""
    boxes = torch.tensor([record.box for record in learned])
    # evenly out of all, so that every kind of picture takes part
    boxes = boxes[torch.linspace(0, len(boxes) - 1, min(BOXES, len(boxes))).long()]
    overlaps = box_iou(boxes, boxes)
    best = boxes[((overlaps >= 0.5).sum(1) + overlaps.mean(1)).argmax()]
    truth = torch.tensor([record.box for record in records])
    shown = [round(v, 4) for v in best.tolist()]
    return score_boxes(best.expand_as(truth), truth), [{"phrase": r.phrase, "box": shown} for r in records]


def random_order(learned: Sequence[Any], records: Sequence[Any]) -> Scored:
    """Recall at k of an order by lot, on average: 1 - C(n - r, k) / C(n, k) for r right ones among n."""
    cleaned = [clean_caption(text) for record in records for text in record.captions]
    texts_of, images_of = right_answers(cleaned, [len(record.captions) for record in records], by_words=False)
    metrics = {}
    for way, right, count in (("i2t", texts_of, len(cleaned)), ("t2i", images_of, len(records))):
        for k in CUTS:
            k_here = min(k, count)
            missed = [comb(count - len(answers), k_here) / comb(count, k_here) for answers in right]
            metrics[f"{way}_r{k}"] = 1 - sum(missed) / len(missed)
    return metrics | {"r_mean": sum(metrics.values()) / len(metrics)}, []


BASELINES: dict[str, dict[str, Callable[[Sequence[Any], Sequence[Any]], Scored] | None]] = {
    "caption": {"nearest": None},
    "vqa": {"majority": majority_answer, "prior": prior_answer},
    "retrieval": {"random": random_order},
    "grounding": {"constant_box": constant_box},
    "statements": {"majority": majority_label},
    "entailment": {"majority": majority_label},
}
"""Of each task its baselines; None: it is made with the model."""
