"""Reasoning by classification of the fused [CLS]: statements on a pair of images (NLVR2), entailment (SNLI-VE)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import Records, read_entailments, read_statements
from mplug_core.data.text import clean_caption
from mplug_core.model.mplug import ImageEncoding, Mplug
from mplug_core.recipe import CLASSES, DataSpec
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Texts, need, rows

LABELS = {name: labels for name, (_, labels) in CLASSES.items()}


class ClassificationTask:
    """Image or images and a text to one of the labels of classifier ``classifier``."""

    def __init__(
        self, name: str, classifier: str, reader: Callable[..., Records[Any]], text: str, label: Callable[[Any], str]
    ) -> None:
        self.name, self.classifier = name, classifier
        self.objectives = (classifier,)
        self.options = ()
        self._reader, self._text, self._label = reader, text, label

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return self._reader(spec.path, spec.split)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        ids, mask = texts.encode([clean_caption(getattr(record, self._text)) for _, record in drawn])
        labels = [LABELS[self.classifier].index(self._label(record)) for _, record in drawn]
        return {"image": rows(drawn), "ids": ids, "mask": mask, "labels": torch.tensor(labels)}

    def losses(self, model: Mplug, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        if not context.wants(self.classifier):
            return {}
        logits = classify(model, self.classifier, images, block["image"], block["ids"], block["mask"])
        return {self.classifier: F.cross_entropy(logits.float(), block["labels"])}

    @torch.inference_mode()
    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Accuracy."""
        need(self.classifier in ready.config.classifiers, f"classifier {self.classifier}")
        records = self.read(spec)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        right: list[bool] = []
        predictions = []
        for images, drawn in evaluation:
            block = {k: v.to(ready.device) for k, v in self.encode(drawn, random.Random(0), ready.texts).items()}
            logits = classify(ready.model, self.classifier, images, block["image"], block["ids"], block["mask"])
            for (_, record), row in zip(drawn, logits.float().softmax(-1).cpu(), strict=True):
                label = LABELS[self.classifier][int(row.argmax())]
                right.append(label == self._label(record))
                text = getattr(record, self._text)
                predictions.append({self._text: text, "label": label, "probability": round(float(row.max()), 4)})
        metrics = {"accuracy": sum(right) / max(len(right), 1)}
        return evaluation.result(self.name, records, metrics, predictions)


def classify(model: Mplug, classifier: str, images: ImageEncoding, which: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [n, labels]: the text [n, T] fused with each of its images (rows ``which`` [n] or [n, 2]), joined."""
    text = model.encode_text(ids, mask)
    columns = which[:, None] if which.dim() == 1 else which
    count = columns.shape[1]
    # all images of all examples in one pass: example by example
    _, fused = model.fuse(
        images[columns.reshape(-1)], text.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    )
    return model.classify(classifier, [fused[k::count] for k in range(count)])


StatementTask = ClassificationTask(
    "statements", "statement", read_statements, "statement", lambda record: "true" if record.label else "false"
)
EntailmentTask = ClassificationTask(
    "entailment", "entailment", read_entailments, "hypothesis", lambda record: record.label
)
