"""The baseline of captioning: every photo gets the caption of the most similar training photo.

Similar is what the model's contrastive image feature says. A captioner that does not beat it repeats what it has seen.
"""

from __future__ import annotations

import time

import torch

from mplug_core.data.records import read_captions
from mplug_core.metrics.intervals import values
from mplug_core.recipe import DataSpec
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.task import EvaluateOptions, Ready, Result, rows


@torch.inference_mode()
def nearest_captions(
    ready: Ready,
    train: DataSpec,
    spec: DataSpec,
    options: EvaluateOptions = EvaluateOptions(),
) -> Result:
    """Caption metrics of the first caption of the nearest photo of ``train``, a photo itself excepted."""
    began = time.perf_counter()
    records = read_captions(spec.path, spec.split, spec.format, spec.images)
    others = read_captions(train.path, train.split, train.format, train.images)
    known, known_features, _ = _features(ready, [r for r in others.records if r.captions], options.batch_size)
    asked, features, skipped = _features(ready, records.records, options.batch_size, options.limit)
    similarity = features @ known_features.T
    places = {record.image: place for place, record in enumerate(known)}
    for row, record in enumerate(asked):
        if record.image in places:
            similarity[row, places[record.image]] = -torch.inf
    chosen = [known[place] for place in similarity.argmax(1).tolist()]
    task = TASKS["caption"]
    listed = [
        task.identity(record) | {"caption": found.captions[0], "nearest": str(found.image)} | task.truth(record)
        for record, found in zip(asked, chosen, strict=True)
    ]
    measures, notes = task.score(asked, listed, records.source)
    skipped += len(records.missing) + len(records.broken)
    seconds = time.perf_counter() - began
    return Result(
        "nearest", len(asked), skipped, values(measures), seconds, listed, notes, measures, asked, records.source
    )


def _features(ready: Ready, records: list, batch_size: int, limit: int | None = None) -> tuple[list, torch.Tensor, int]:
    """Records whose image can be read, their features [n, E], and how many were skipped."""
    evaluation = Evaluation(ready, records, batch_size, limit)
    kept, parts = [], []
    for images, drawn in evaluation:
        kept += [record for _, record in drawn]
        parts.append(images.feature[rows(drawn)].float().cpu())
    features = torch.cat(parts) if parts else torch.empty(0, ready.config.embed_dim)
    return kept, features, len(evaluation.skipped)
