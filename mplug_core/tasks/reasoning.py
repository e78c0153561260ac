"""Reasoning by classification of the fused [CLS]: statements on images (NLVR2, NLVR), entailment (SNLI-VE).

A classifier joins the [CLS] of as many fused pairs as it was made for (paper section 3.4: both images of NLVR2). A
statement on one image, a photo or NLVR's strip of three boxes, has that image on both sides: it is fused once, and its
[CLS] joined with itself.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mplug_core.data.batches import Block, Drawn, image_keys
from mplug_core.data.records import EntailmentRecord, Records, read_entailments, read_statements
from mplug_core.data.text import clean_caption
from mplug_core.errors import DataError
from mplug_core.metrics.calibration import calibration_measures
from mplug_core.metrics.intervals import Measure, clusters_of, values
from mplug_core.metrics.reasoning import label_measures, submission
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.recipe import CLASSES, DataSpec
from mplug_core.tasks.confidence import SHOWN, Evidence, shares
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Scored, Texts, need

LABELS = {name: labels for name, (_, labels) in CLASSES.items()}
TINY = 1e-30
"""A probability that has a logarithm."""


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
        self.text, self.identifier = text, identifier
        self._reader, self._label = reader, label
        self._per_label = per_label

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return self._reader(spec.path, spec.split, spec.format, spec.images)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        """DataError if a record's label is hidden."""
        ids, mask = texts.read([clean(getattr(record, self.text)) for _, record in drawn])
        known = LABELS[self.classifier]
        labels = [self._label(record) for _, record in drawn]
        if None in labels:
            hidden = getattr(drawn[labels.index(None)][1], self.text)
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
        """Accuracy and calibration error; of statements also consistency, where the data have groups, of entailment
        accuracy per label."""
        need(self.classifier in ready.config.classifiers, f"classifier {self.classifier}")
        return self.evaluate_records(ready, self.read(spec), options)

    def evaluate_records(self, ready: Ready, records: Records[Any], options: EvaluateOptions) -> Result:
        """The evaluation of what was read. Records without a label are answered and not scored."""
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        predictions: list[dict[str, Any]] = []
        evidence = Evidence(self.classifier)
        for images, drawn in evaluation:
            texts = [getattr(record, self.text) for _, record in drawn]
            probabilities = judge(ready, self.classifier, images, [rows for rows, _ in drawn], texts)
            for (_, record), row in evaluation.sound(drawn, probabilities.unbind()):
                sure = float(row.max())
                said = {"label": LABELS[self.classifier][int(row.argmax())], "probability": round(sure, 4)}
                said["confidence"] = round(sure, SHOWN)
                predictions.append(self.identity(record) | said | self.truth(record))
                evidence.add(sure, row.clamp_min(TINY).log().tolist())
        return evaluation.scored(self, records, predictions, evidence)

    def identity(self, record: Any) -> dict[str, Any]:
        identifier = getattr(record, self.identifier)
        named = {self.identifier: identifier} if identifier else {}
        return named | shown_images(record) | {self.text: getattr(record, self.text)}

    def truth(self, record: Any) -> dict[str, Any]:
        label, kind, group = self._label(record), getattr(record, "kind", ""), getattr(record, "group", "")
        known = {} if label is None else {"truth": label}
        return known | ({"kind": kind} if kind else {}) | ({"group": group} if group else {})

    def score(self, records: Sequence[Any], predictions: Sequence[Mapping[str, Any]], source: Path) -> Scored:
        images = [image_keys(record) for record in records]
        groups = [getattr(record, "group", "") for record in records]
        measures = label_measures(
            [prediction["label"] for prediction in predictions],
            [self._label(record) for record in records],
            images,
            groups,
            self._per_label,
            [getattr(record, "kind", "") for record in records],
        )
        sure, right = [prediction.get("confidence") for prediction in predictions], self.rightness(records, predictions)
        return measures | calibration_measures(clusters_of(images, groups), sure, right), []

    def rightness(self, records: Sequence[Any], predictions: Sequence[Mapping[str, Any]]) -> list[bool | None]:
        """Whether each label is the right one."""
        truth = [self._label(record) for record in records]
        return [None if t is None else p["label"] == t for t, p in zip(truth, predictions, strict=True)]


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
    identifier, text = "identifier", "statement"

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """What the data's own task measures; where a folder has both, the metrics of both, named after them."""
        found = self.read(spec)
        for task, _ in found:
            need(task.classifier in ready.config.classifiers, f"classifier {task.classifier}")
        results = [task.evaluate_records(ready, records, options) for task, records in found]
        answered = [record for r in results for record in r.records]
        predictions = [prediction for r in results for prediction in r.predictions]
        measures, notes = self.score(answered, predictions, results[0].source)
        return Result(
            self.name,
            sum(r.n for r in results),
            sum(r.skipped for r in results),
            values(measures),
            sum(r.seconds for r in results),
            predictions,
            [note for r in results for note in r.notes] + notes,
            measures,
            answered,
            results[0].source,
            not_finite=sum(r.not_finite for r in results),
        )

    def identity(self, record: Any) -> dict[str, Any]:
        return _task_of(record).identity(record)

    def truth(self, record: Any) -> dict[str, Any]:
        return _task_of(record).truth(record)

    def rightness(self, records: Sequence[Any], predictions: Sequence[Mapping[str, Any]]) -> list[bool | None]:
        pairs = zip(records, predictions, strict=True)
        return [_task_of(record).rightness([record], [prediction])[0] for record, prediction in pairs]

    def score(self, records: Sequence[Any], predictions: Sequence[Mapping[str, Any]], source: Path) -> Scored:
        """The metrics of the one task, or where there are records of both, of both, named after them."""
        parts: dict[ClassificationTask, list[tuple[Any, Mapping[str, Any]]]] = {}
        for record, prediction in zip(records, predictions, strict=True):
            parts.setdefault(_task_of(record), []).append((record, prediction))
        measures: dict[str, Measure] = {}
        for task, pairs in parts.items():
            named = f"{task.name}_" if len(parts) > 1 else ""
            found, _ = task.score(*zip(*pairs, strict=True), source)
            measures |= {named + name: measure for name, measure in found.items()}
        return measures, []

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
    """Probabilities [n, labels] of :data:`LABELS`, on the CPU: text i on the images ``rows[i]``, one or two; calibrated
    as the model says.

    CheckpointError if the model has no such classifier.
    """
    need(classifier in ready.config.classifiers, f"classifier {classifier}")
    ids, mask = (tensor.to(ready.device) for tensor in ready.texts.read([clean(text) for text in texts]))
    which = sides(rows, ready.config.classifiers[classifier].images).to(ready.device)
    return shares(ready.config, classifier, classify(ready.model, classifier, images, which, ids, mask).float()).cpu()


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


def _task_of(record: Any) -> ClassificationTask:
    return EntailmentTask if isinstance(record, EntailmentRecord) else StatementTask


def _truth(record: Any) -> str | None:
    return None if record.label is None else str(record.label).lower()


StatementTask = StatementClassification("statements", "statement", read_statements, "statement", "identifier", _truth)
EntailmentTask = ClassificationTask(
    "entailment", "entailment", read_entailments, "hypothesis", "pair_id", lambda record: record.label, per_label=True
)
