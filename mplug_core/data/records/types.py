"""The typed records, one class a task, and :class:`Records`, what a reader found. Needs the standard library alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from mplug_core.errors import DataError

Format = str
"""A name of :data:`FORMATS`."""

ENTAILMENT_LABELS = ("entailment", "neutral", "contradiction")

KINDS = {
    "caption": "captions",
    "retrieval": "captions",
    "pretrain": "captions",
    "vqa": "questions",
    "grounding": "phrases",
    "statements": "statements",
    "entailment": "entailments",
}
"""Task -> what its records are called, which is also the name of its own files (``captions.jsonl``)."""

KIND_FORMATS = {
    "captions": ("jsonl", "json", "flickr8k", "flickr30k", "token", "tsv", "entities", "coco", "karpathy", "nocaps"),
    "questions": ("jsonl", "json", "vqa", "vgqa", "gqa", "daquar"),
    "phrases": ("jsonl", "json", "refcoco", "coco_boxes", "entities"),
    "statements": ("jsonl", "json", "nlvr2", "nlvr"),
    "entailments": ("jsonl", "json", "snli_ve"),
}

FORMATS = {task: KIND_FORMATS[kind] for task, kind in KINDS.items()}
"""Task -> the formats that its reader knows, as ``--format`` and a recipe's ``format`` name them."""


@dataclass(frozen=True)
class CaptionRecord:
    """One image with all of its captions. ``image`` is None where only the captions were asked for.

    ``domain`` is NoCaps' "in-domain", "near-domain" or "out-domain", elsewhere empty.
    """

    image: Path | None
    captions: tuple[str, ...]
    image_id: str
    domain: str = ""


@dataclass(frozen=True)
class QuestionRecord:
    """A question with its distinct answers and their relative frequencies: ``weights`` sum to 1.

    Both are empty where the file has no answers (a test split). ``annotators`` has each annotator's answer as given, in
    the file's order (VQA v2: ten), where the file tells them apart. ``kind`` is a free word ("color", "yes/no",
    "query", ...) or empty. ``together`` says that the answers are the parts of one answer (a set, as DAQUAR has them),
    not what different people said. ``image`` is None where only the texts were asked for.
    """

    image: Path | None
    question: str
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    kind: str
    question_id: str = ""
    annotators: tuple[str, ...] = ()
    together: bool = False


@dataclass(frozen=True)
class PhraseRecord:
    """A phrase and the box it means: (x0, y0, x1, y1) as shares 0..1 of the image's width and height.

    ``size`` is (width, height) in pixels as the file states it, ``kind`` a free word or empty.
    """

    image: Path
    phrase: str
    box: tuple[float, float, float, float]
    phrase_id: str = ""
    size: tuple[int, int] | None = field(default=None, compare=False)
    kind: str = field(default="", compare=False)


@dataclass(frozen=True)
class StatementRecord:
    """A statement on one image or a pair, and whether it is true; None where the label is hidden (a test split).

    ``identifier`` is the official one. Records with the same ``group`` are one sentence on several images: consistency
    counts a group as right where all of it is. ``kind`` is a free word or empty.
    """

    images: tuple[Path, ...]
    statement: str
    label: bool | None
    identifier: str = ""
    group: str = ""
    kind: str = field(default="", compare=False)


@dataclass(frozen=True)
class EntailmentRecord:
    """A hypothesis on an image: ``label`` is "entailment", "neutral" or "contradiction", None where it is hidden.

    ``premise`` is the caption that SNLI's text-only task has in place of the image.
    """

    image: Path
    hypothesis: str
    label: str | None
    pair_id: str = ""
    premise: str = ""


Record = CaptionRecord | QuestionRecord | PhraseRecord | StatementRecord | EntailmentRecord
R = TypeVar("R", CaptionRecord, QuestionRecord, PhraseRecord, StatementRecord, EntailmentRecord)


@dataclass(frozen=True)
class Records(Generic[R]):
    """What a reader found: usable ``records``, ``missing`` images, ``broken`` entries as errors that name them."""

    records: list[R]
    source: Path
    format: Format
    missing: list[Path] = field(default_factory=list)
    broken: list[DataError] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[R]:
        return iter(self.records)

    def report(self) -> str:
        """One line: how many records, what is missing, what is broken, with the first of each."""
        parts = [f"{self.source} ({self.format}): {counted(len(self.records), 'record')}"]
        if self.missing:
            parts.append(f"{counted(len(self.missing), 'missing image')} (first: {self.missing[0]})")
        if self.broken:
            broken = counted(len(self.broken), "broken entry", "broken entries")
            parts.append(f"{broken} (first: {self.broken[0].message})")
        return "; ".join(parts)

    def complete(self) -> Records[R]:
        """Itself if nothing is missing or broken; otherwise raises DataError with the report."""
        if self.missing or self.broken:
            raise DataError(f"the data set is not complete: {self.report()}", "repair or remove what is named")
        return self


CaptionData = Records[CaptionRecord]


def images_of(record: Record) -> tuple[Path, ...]:
    """The images of a record: none, one or two."""
    if isinstance(record, StatementRecord):
        return record.images
    return () if record.image is None else (record.image,)


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 record``, ``2,000 records``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
