"""The baselines of grounding: the same box for every phrase. A model that looks at the image beats them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mplug_core.data.placement import Box
from mplug_core.data.records import PhraseRecord, read_phrases
from mplug_core.errors import DataError
from mplug_core.metrics.grounding import RIGHT, score_boxes
from mplug_core.objectives.box import box_iou
from mplug_core.recipe import DataSpec
from mplug_core.tasks.task import Result

WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)
CENTER: Box = (0.25, 0.25, 0.75, 0.75)
CANDIDATES = 2000


def constant_box(train: Sequence[PhraseRecord]) -> Box:
    """The box that would be right most often on the training phrases; of several, the one with the largest overlap.

    Tried are the training boxes themselves (of more than :data:`CANDIDATES` an even choice) and their mean. DataError
    without records.
    """
    if not train:
        raise DataError("nothing to learn a constant box from: no records")
    boxes = torch.tensor([record.box for record in train])
    distinct = boxes.unique(dim=0)
    tried = distinct[:: -(-len(distinct) // CANDIDATES)]
    tried = torch.cat([tried, boxes.mean(0, keepdim=True)])
    scores = []
    for candidate in tried:
        overlaps = box_iou(candidate, boxes)
        scores.append(((overlaps >= RIGHT).float().mean().item(), overlaps.mean().item()))
    best = max(range(len(scores)), key=scores.__getitem__)
    return tuple(tried[best].tolist())  # type: ignore[return-value]


def baseline_boxes(train: Sequence[PhraseRecord]) -> dict[str, Box]:
    """Constant boxes by name: the whole image, its center half by half, and the best one of the training phrases."""
    return {"whole": WHOLE_IMAGE, "center": CENTER, "constant": constant_box(train)}


def constant_boxes(train: DataSpec, spec: DataSpec, limit: int | None = None) -> Result:
    """Metrics of each of :func:`baseline_boxes` on the phrases of ``spec``, its name before them."""
    began = time.perf_counter()
    others = read_phrases(train.path, train.split, train.format, train.images)
    records = read_phrases(spec.path, spec.split, spec.format, spec.images)
    asked = records.records[:limit]
    if not asked:
        raise DataError("nothing to evaluate: no records")
    truth = torch.tensor([record.box for record in asked])
    metrics: dict[str, float] = {}
    for name, box in baseline_boxes(others.records).items():
        found = torch.tensor(box).expand(len(truth), 4)
        metrics |= {f"{name}_{metric}": value for metric, value in score_boxes(found, truth).items()}
    skipped = len(records.missing) + len(records.broken)
    return Result("constant_box", len(asked), skipped, metrics, time.perf_counter() - began)
