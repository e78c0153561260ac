"""Reasoning by classification of the fused [CLS]: statements on images (NLVR2, NLVR), entailment (SNLI-VE).

A classifier joins the [CLS] of as many fused pairs as it was made for (paper section 3.4: both images of NLVR2). A
statement on one image, a photo or NLVR's strip of three boxes, has that image on both sides: it is fused once, and its
[CLS] joined with itself.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mplug_core.data.batches import Block, Drawn, image_keys
from mplug_core.data.records import Records, read_entailments, read_statements
from mplug_core.data.text import clean_caption
from mplug_core.errors import DataError
from mplug_core.metrics.reasoning import score_labels, submission
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.recipe import CLASSES, DataSpec
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Texts, need

LABELS = {name: labels for name, (_, labels) in CLASSES.items()}


class ClassificationTask:
    """Image or images and a text to one of the labels of classifier ``classifier``.

    ``text`` and ``identifier`` are names of the record's fields; ``label`` gives a record's label, None if hidden.
    """

    options = ()

    def __init__(
        self,
        name: str,
        classifier: str,
        reader: Callable[..., Records[Any]],
        text: str,
        identifier: str,
        label: Callable[[Any], str | None],
        per_label: bool = False,
    ) -> None:
        self.name, self.classifier = name, classifier
        self.objectives = (classifier,)
        self._reader, self._text, self._identifier, self._label = reader, text, identifier, label
        self._per_label = per_label

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return self._reader(spec.path, spec.split, spec.format, spec.images)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        """DataError if a record's label is hidden."""
        ids, mask = texts.read([clean(getattr(record, self._text)) for _, record in drawn])
        known = LABELS[self.classifier]
        labels = [self._label(record) for _, record in drawn]
        if None in labels:
            hidden = getattr(drawn[labels.index(None)][1], self._text)
            raise DataError(f"{self.name} without labels can't be learned from: {hidden!r}", "name a split with labels")
        return {
            "image": sides([rows for rows, _ in drawn], CLASSES[self.classifier][0]),
            "ids": ids, "mask": mask, "labels": torch.tensor([known.index(label) for label in labels]),
        }  # fmt: skip

    def losses(self, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        if not context.wants(self.classifier):
            return {}
        logits = classify(model, self.classifier, images, block["image"], block["ids"], block["mask"])
        return {self.classifier: F.cross_entropy(logits.float(), block["labels"])}

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Accuracy; of statements also consistency, where the data have groups, of entailment accuracy per label."""
        need(self.classifier in ready.config.classifiers, f"classifier {self.classifier}")
        return self.evaluate_records(ready, self.read(spec), options)

    def evaluate_records(self, ready: Ready, records: Records[Any], options: EvaluateOptions) -> Result:
        """The evaluation of what was read. Records without a label are answered and not scored."""
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        labels: list[str | None] = []
        groups: list[str] = []
        predictions: list[dict[str, Any]] = []
        for images, drawn in evaluation:
            texts = [getattr(record, self._text) for _, record in drawn]
            probabilities = judge(ready, self.classifier, images, [rows for rows, _ in drawn], texts)
            for (_, record), text, row in zip(drawn, texts, probabilities, strict=True):
                labels.append(self._label(record))
                groups.append(getattr(record, "group", ""))
                identifier = getattr(record, self._identifier)
                predictions.append(
                    ({self._identifier: identifier} if identifier else {})
                    | shown_images(record)
                    | {self._text: text}
                    | {"label": LABELS[self.classifier][int(row.argmax())], "probability": round(float(row.max()), 4)}
                )
        metrics = score_labels([p["label"] for p in predictions], labels, groups, self._per_label)
        return evaluation.result(self.name, records, metrics, predictions)


class StatementClassification(ClassificationTask):
    """Statements, which NLVR2's evaluation takes as lines."""

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Predictions of :meth:`evaluate` as ``identifier,True``; DataError for one without an identifier."""
        return submission(predictions)


class ReasoningTask:
    """Statements or entailment, whichever the data are. For evaluation: training names the one that it means."""

    name = "reasoning"
    objectives = ()
    options = ()

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """What the data's own task measures; where a folder has both, the metrics of both, named after them."""
        found = self.read(spec)
        for task, _ in found:
            need(task.classifier in ready.config.classifiers, f"classifier {task.classifier}")
        results = [task.evaluate_records(ready, records, options) for task, records in found]
        metrics = results[0].metrics
        if len(results) > 1:
            metrics = {f"{r.task}_{name}": value for r in results for name, value in r.metrics.items()}
        return Result(
            self.name,
            sum(r.n for r in results),
            sum(r.skipped for r in results),
            metrics,
            sum(r.seconds for r in results),
            [prediction for r in results for prediction in r.predictions],
            [note for r in results for note in r.notes],
        )

    def read(self, spec: DataSpec, text_only: bool = False) -> list[tuple[ClassificationTask, Records[Any]]]:
        """The tasks that the data serve, with their records; DataError with what both miss if there is none."""
        found, faults = [], []
        for task in (StatementTask, EntailmentTask):
            try:
                found.append((task, task.read(spec)))
            except DataError as error:
                faults.append(error)
        if not found and len({fault.message for fault in faults}) == 1:
            raise faults[0]
        if not found:
            neither = "; ".join(fault.message for fault in faults)
            raise DataError(f"{spec.path} holds neither statements nor entailment: {neither}", faults[0].hint)
        return found


def clean(text: str) -> str:
    """A statement as models see it: like a caption, but whole, as its last words may turn its truth."""
    return clean_caption(text, max_words=sys.maxsize)


def shown_images(record: Any) -> dict[str, Any]:
    """``{"image": PATH}`` or ``{"images": [PATH, PATH]}``."""
    paths = [str(path) for path in image_keys(record)]
    return {"image": paths[0]} if len(paths) == 1 else {"images": paths}


def sides(rows: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """Rows of each example's images as [n, ``count``], [n] for a count of 1; a single image stands on every side."""
    index = torch.tensor([row * count if len(row) == 1 else row for row in rows])
    return index[:, 0] if index.shape[1] == 1 else index


@torch.inference_mode()
def judge(
    ready: Ready, classifier: str, images: ImageEncoding, rows: Sequence[tuple[int, ...]], texts: Sequence[str]
) -> Tensor:
    """Probabilities [n, labels] of :data:`LABELS`, on the CPU: text i on the images ``rows[i]``, one or two.

    CheckpointError if the model has no such classifier.
    """
    need(classifier in ready.config.classifiers, f"classifier {classifier}")
    ids, mask = (tensor.to(ready.device) for tensor in ready.texts.read([clean(text) for text in texts]))
    which = sides(rows, ready.config.classifiers[classifier].images).to(ready.device)
    return classify(ready.model, classifier, images, which, ids, mask).float().softmax(-1).cpu()


def classify(
    model: MplugModel, classifier: str, images: ImageEncoding, which: Tensor, ids: Tensor, mask: Tensor
) -> Tensor:
    """Logits [n, labels]: the text [n, T] fused with each of its images (rows ``which`` [n] or [n, 2]), joined.

    An image that stands on both sides of an example is fused once.
    """
    text = model.encode_text(ids, mask)
    columns = which[:, None] if which.dim() == 1 else which
    count = columns.shape[1]
    fused_here = columns != columns[:, :1]
    fused_here[:, 0] = True
    # all different images of all examples in one pass: example by example
    example, side = fused_here.nonzero(as_tuple=True)
    _, fused = model.fuse(images[columns[example, side]], text[example], mask[example])
    places = fused_here.flatten().cumsum(0).view_as(columns) - 1
    places = torch.where(fused_here, places, places[:, :1])
    first = fused[:, :1]
    return model.classify(classifier, [first[places[:, k]] for k in range(count)])


def _truth(record: Any) -> str | None:
    return None if record.label is None else str(record.label).lower()


StatementTask = StatementClassification("statements", "statement", read_statements, "statement", "identifier", _truth)
EntailmentTask = ClassificationTask(
    "entailment", "entailment", read_entailments, "hypothesis", "pair_id", lambda record: record.label, per_label=True
)
