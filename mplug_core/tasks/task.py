"""The task interface: records to texts, texts to losses, images to answers, answers to scores.

The trainer, the evaluator and the command line know only this. A task is one file of this folder and a line in
:data:`mplug_core.tasks.registry.TASKS`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.text import Tokenizer, clean_question, pad
from mplug_core.errors import CheckpointError
from mplug_core.generation import Decoding, room_of
from mplug_core.limits import MOST_AT_ONCE
from mplug_core.metrics.intervals import Interval, Measure, intervals
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.model.teacher import FeatureQueue, Teacher
from mplug_core.recipe import DataSpec, SelfCriticalSection
from mplug_core.tasks.confidence import Evidence


@dataclass
class Texts:
    """How texts become ids: the tokenizer and the longest text, special tokens included.

    ``answers`` is how many answers of a question are trained on (None: all). ``end``: texts that are read end with
    [SEP], as ``model.text_end`` says. ``fused_share``: of the pairs of a batch, those that are fused.
    """

    tokenizer: Tokenizer
    max_length: int
    answers: int | None = None
    end: bool = True
    fused_share: float = 1.0

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``[CLS] text [SEP]`` ids and mask [B, T]: of what is written."""
        return pad([self.tokenizer.encode(text, self.max_length) for text in texts], self.tokenizer.pad_id)

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T] of what the text encoder reads, with [SEP] behind it or, for some models, without."""
        return pad([self.tokenizer.encode(text, self.max_length, self.end) for text in texts], self.tokenizer.pad_id)


def own_decoding(config: MplugConfig, task: Literal["caption", "vqa"], default: Decoding) -> Decoding:
    """``default`` with what a model's configuration says for the task."""
    own = config.decoding.get(task)
    return default if own is None else default.model_copy(update=own.model_dump(exclude_none=True))


@dataclass
class Ready:
    """A model in evaluation mode and the tokenizer that belongs to it."""

    model: MplugModel
    tokenizer: Tokenizer

    @property
    def config(self) -> MplugConfig:
        return self.model.config

    @property
    def texts(self) -> Texts:
        return Texts(self.tokenizer, self.config.max_positions, end=self.config.text_end)

    def decoding(self, task: Literal["caption", "vqa"], default: Decoding) -> Decoding:
        """How this model writes: ``default`` with what its configuration says for the task."""
        return own_decoding(self.config, task, default)

    def unknown_share(self, text: str) -> float:
        """The share of a text's pieces that the model can't know, punctuation left out; see :data:`MOSTLY_UNKNOWN`."""
        return self.tokenizer.unknown_share(clean_question(text))

    @property
    def room(self) -> int:
        """How many tokens its decoder can write. CheckpointError without one."""
        need(self.model.decoder is not None, "decoder")
        return room_of(self.model.decoder)

    @property
    def device(self) -> torch.device:
        return self.model.temperature.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.temperature.dtype


@dataclass
class Context:
    """What a loss may need beside the model: distillation, queue, the other processes, and a place for counts.

    ``teacher_images`` gives the teacher's encoding of the batch's images, computed at the first call. ``gather``
    joins detached features or ids of all processes, ``gather_with_gradient`` the student's features, as far as the run
    sends gradient back to them; ``autocast`` gives the teacher the compute type of the run; ``counts`` are summed over
    steps and written to the metrics, ``figures`` are averaged over them.
    """

    alpha: float = 0.0
    label_smoothing: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)
    teacher: Teacher | None = None
    teacher_images: Callable[[], ImageEncoding] | None = None
    queue: FeatureQueue | None = None
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather_with_gradient: Callable[[Tensor], Tensor] = lambda tensor: tensor
    image_ids: Tensor | None = None
    generator: torch.Generator | None = None
    autocast: Callable[[], AbstractContextManager] = nullcontext
    self_critical: SelfCriticalSection = field(default_factory=SelfCriticalSection)
    counts: dict[str, Tensor | int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def wants(self, objective: str) -> bool:
        """Whether the recipe gives this objective any weight."""
        return self.weights.get(objective, 0.0) > 0

    def taught(self, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A head of the teacher in the compute type of the run."""

        def logits(rows: Tensor) -> Tensor:
            with self.autocast():
                return head(rows)

        return logits

    def count(self, name: str, value: Tensor | int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + value


@dataclass
class Result:
    """An evaluation: examples answered, examples skipped, metrics by name, seconds, what was predicted, and notes: a
    line each on what the metrics leave out.

    ``measures`` are the metrics as sums, of which intervals are made; ``records`` those that were answered, read from
    ``source``; ``evidence`` is what a calibration can be fitted on, of tasks that have one; ``not_finite`` is how many
    of the skipped have an answer that is not a number.
    """

    task: str
    n: int
    skipped: int
    metrics: dict[str, float]
    seconds: float
    predictions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    records: list[Any] = field(default_factory=list)
    source: Path = Path()
    evidence: Evidence | None = None
    not_finite: int = 0

    def intervals(self) -> dict[str, Interval]:
        """The 95 % interval of each metric, by a bootstrap over images."""
        found = intervals(self.measures)
        return {name: found[name] for name in self.metrics if name in found}


class EvaluateOptions(BaseModel):
    """How to evaluate. A task uses ``limit`` and ``batch_size`` (images at once), and of the others those that its
    ``options`` names.

    ``decoding`` replaces the task's own; ``answers`` are candidates to rank instead of generating; ``candidates`` is
    how many of the best by ITC are re-ranked by ITM (0: none), with the score that ``rerank`` names; ``draws`` is how
    many boxes are drawn of which the safest is the answer (0: greedy). A ``decoding`` that draws has draws by the
    ``seed``, the image and the question.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Annotated[int, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(gt=0, le=MOST_AT_ONCE)] = 32
    decoding: Decoding | None = None
    answers: tuple[str, ...] | None = None
    candidates: Annotated[int, Field(ge=0)] | None = None
    rerank: Literal["itm", "itm+itc"] = "itm"
    draws: Annotated[int, Field(ge=0, le=MOST_AT_ONCE)] | None = None
    seed: int = 0


Scored = tuple[dict[str, Measure], list[str]]
"""Metrics as sums, and a line on each thing that they leave out."""


class Task(Protocol):
    """What a task file offers.

    ``identifier`` and ``text`` are the fields of a prediction that tell its record from others: its id, and beside the
    image what is asked about it; empty where there is none.
    A task whose answers are right or wrong also has ``rightness(records, predictions)``: of each prediction how right
    it is, a bool or 0 .. 1, None where the truth is hidden.
    """

    name: str
    objectives: tuple[str, ...]
    options: tuple[str, ...]
    identifier: str
    text: str

    def read(self, spec: DataSpec, text_only: bool = False) -> Any:
        """The task's :class:`~mplug_core.data.records.Records`."""

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        """Ids, masks and targets of records; ``image`` [n] or [n, 2] are rows of the batch's images."""

    def losses(self, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        """Scalar losses by objective."""

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Answer every record and score the answers."""

    def identity(self, record: Any) -> dict[str, Any]:
        """The fields of a prediction that say which record it answers."""

    def truth(self, record: Any) -> dict[str, Any]:
        """``truth``, the right answer in the form of the task's answers, left out where it is hidden; and ``kind``."""

    def score(self, records: Sequence[Any], predictions: Sequence[Mapping[str, Any]], source: Path) -> Scored:
        """The metrics of predictions, one for each of ``records`` in their order, which were read from ``source``."""


def mark_right(task: Any, records: Sequence[Any], predictions: Sequence[dict[str, Any]]) -> list[float | None]:
    """Say in each prediction how ``right`` it is, and return it; nothing of a task that has no such thing."""
    if not hasattr(task, "rightness"):
        return []
    found = task.rightness(records, predictions)
    for prediction, right in zip(predictions, found, strict=True):
        prediction.pop("right", None)
        if right is not None:
            prediction["right"] = right
    return found


def need(part: object, name: str) -> None:
    """CheckpointError if the model was made without a part that a task uses."""
    if not part:
        raise CheckpointError(f"this model has no {name}", "choose a model that was trained for the task")


def rows(drawn: list[Drawn]) -> Tensor:
    """Rows of the images of each record: [n], or [n, 2] for pairs."""
    index = torch.tensor([images for images, _ in drawn])
    return index[:, 0] if index.shape[1] == 1 else index
