"""What a step of a recipe works on, with or without its data: batches whose ids are real and whose pixels are not.

Where records are at hand they are drawn and encoded as in training. Where not, invented ones take their place, with
texts about as long as the longest of a batch usually is, since a batch is padded to that.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mplug_core.data.batches import Batch, HeldFeatures, Source
from mplug_core.data.placement import WHOLE
from mplug_core.data.records.types import (
    CaptionRecord,
    EntailmentRecord,
    PhraseRecord,
    QuestionRecord,
    StatementRecord,
)
from mplug_core.data.scenes import sample_scene
from mplug_core.data.text import SPECIAL_TOKENS, Tokenizer
from mplug_core.model.config import MplugConfig
from mplug_core.model.hollow import hollow
from mplug_core.model.mplug import MplugModel
from mplug_core.model.teacher import FeatureQueue, Teacher, build_teacher
from mplug_core.objectives.self_critical import log_probabilities
from mplug_core.recipe import Recipe, SourceSection, StageSection
from mplug_core.tasks.caption import CaptionReward, CaptionTask, forbidden_tokens
from mplug_core.tasks.patches import PatchTask, SceneImage
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.task import Context, Texts
from mplug_core.training.stand_in import StandIn
from mplug_core.training.step import TrainStep, build_context

WORDS = {"caption": 24, "question": 14, "answer": 3, "phrase": 8, "statement": 30, "hypothesis": 16}
"""Words of the longest text of a batch where there are no data to look at: COCO's captions, VQA v2's questions, and
so on."""


def stand_in_tokenizer(config: MplugConfig) -> Tokenizer:
    """A vocabulary of the model's size whose words mean nothing, for a model whose own is not known yet."""
    boxes = [f"[box_{k}]" for k in range(config.box_bins)]
    words = config.vocab_size - len(SPECIAL_TOKENS) - len(boxes)
    return Tokenizer([*SPECIAL_TOKENS, *(f"w{k}" for k in range(max(words, 1))), *boxes])


def invented_records(section: SourceSection, task: str, images: int) -> list[Any]:
    """Records of a task on ``images`` images, with texts of the lengths in :data:`WORDS`."""

    def text(kind: str, number: int) -> str:
        return " ".join(f"w{(number * 31 + k) % 97}" for k in range(WORDS[kind]))

    places = [None if section.text_only else Path(f"{k}.jpg") for k in range(images)]
    each = range(max(1, -(-int(section.tasks.get(task, 1) * 100) // 100)))
    if task in ("pretrain", "caption", "retrieval"):
        return [CaptionRecord(place, (text("caption", k),), str(k)) for k, place in enumerate(places)]
    if task == "vqa":
        return [
            QuestionRecord(place, text("question", k + q), (text("answer", k),), (1.0,), "", f"{k}/{q}")
            for k, place in enumerate(places)
            for q in each
        ]
    if task == "grounding":
        return [
            PhraseRecord(place, text("phrase", k + q), (0.2, 0.2, 0.6, 0.6))
            for k, place in enumerate(places)
            for q in each
        ]
    if task == "statements":
        pairs = zip(places[::2], places[1::2], strict=True)
        return [
            StatementRecord(pair, text("statement", k + q), True, f"{k}/{q}")
            for k, pair in enumerate(pairs)
            for q in each
        ]
    if task == "entailment":
        return [
            EntailmentRecord(place, text("hypothesis", k + q), "neutral")
            for k, place in enumerate(places)
            for q in each
        ]
    return [SceneImage(place, sample_scene(0, "train", k)) for k, place in enumerate(places)]


def invented_source(
    name: str, section: SourceSection, config: MplugConfig, texts: Texts, tasks: Mapping[str, Any]
) -> Source:
    """A source of invented records, enough for a batch."""
    images = 2 * section.batch_size + section.batch_size % 2
    records = {task: invented_records(section, task, images) for task in section.tasks}
    section = section.model_copy(update={"limit": None})
    return Source(name, section, records, config.vision, encoders_of(section, tasks, texts))


def encoders_of(section: SourceSection, tasks: Mapping[str, Any], texts: Texts) -> dict[str, Any]:
    """How a source's records become blocks, by task."""

    def encoder(task: str) -> Any:
        return lambda drawn, rng: tasks[task].encode(drawn, rng, texts)

    return {task: encoder(task) for task in section.tasks}


class Unread:
    """A source whose batches are drawn and encoded as in training, but no picture is opened.

    ``pixels``, ``features`` and ``stand_in`` of its batches have the right shape and no content.
    """

    def __init__(self, source: Source, config: MplugConfig, cells: int, channels: int, cached: bool = True) -> None:
        """``cells`` and ``channels`` of the visual encoder's output; ``cached``: where it is frozen."""
        self.source = copy.copy(source)
        self.size = config.vision.image_size
        self.source.cached = cached
        self.source.load = lambda image, rng: (torch.empty(3, self.size, self.size, device="meta"), WHOLE)
        section, images = source.section, len(source.images)
        if section.cached_views and not section.text_only:
            self.source.features = HeldFeatures(_zeros((1, images, cells, channels), np.float32))
            self.source.placements = np.broadcast_to(np.array([1.0, 1.0, 0.0, 0.0]), (1, images, 4))
            self.source.aligned = None
        if section.text_only:
            self.source.aligned = _zeros((1, images, config.embed_dim), np.float32)

    def batch(self, size: int, seed: int = 0) -> Batch:
        """A batch of about ``size`` images."""
        groups = max(1, size // self.source.per_group)
        rng = random.Random(seed)
        order = list(range(len(self.source.groups)))
        rng.shuffle(order)
        chosen = [order[k % len(order)] for k in range(groups)]
        images = [image for k in chosen for image in self.source.groups[k]]
        return self.source.batch(images, rng)


def _zeros(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Zeros that take no memory."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


class _WrittenCaptions(CaptionTask):
    """Captioning whose captions to reward are not searched for, which depends on weights, but taken as longest ones."""

    def _self_critical(
        self, model: MplugModel, memory: Tensor, mask: Tensor, references: Any, context: Context
    ) -> Tensor:
        settings, tokenizer = context.self_critical, self.reward.tokenizer
        written = [[[tokenizer.unk_id] * settings.max_tokens] * settings.captions for _ in range(len(memory))]
        known = {"start": tokenizer.cls_id, "end": tokenizer.sep_id, "forbidden": forbidden_tokens(tokenizer)}
        with torch.no_grad():  # the search sees as many tokens as the loss
            log_probabilities(model.decoder, memory.detach(), mask, written, **known)
            if settings.variant == "sample":
                greedy = [row[:1] for row in written]
                log_probabilities(model.decoder, memory.detach(), mask, greedy, **known)
        scores, lengths = log_probabilities(model.decoder, memory, mask, written, **known)
        return -scores.sum() / lengths.sum()


@dataclass
class Workbench:
    """A recipe's model without weights, its tasks and its sources, to trace steps on.

    ``known`` are the names of the sources whose records were there; the others are invented.
    """

    recipe: Recipe
    config: MplugConfig
    tokenizer: Tokenizer
    sources: dict[str, Source]
    known: frozenset[str]
    seen: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        config: MplugConfig,
        tokenizer: Tokenizer | None = None,
        sources: Mapping[str, Source] | Sequence[Source] = (),
    ) -> Workbench:
        """``tokenizer`` and ``sources`` as far as they are there."""
        given = dict(sources) if isinstance(sources, Mapping) else {source.name: source for source in sources}
        # what is streamed has no records at hand
        given = {name: source for name, source in given.items() if type(source) is Source}
        tokenizer = tokenizer or stand_in_tokenizer(config)
        bench = cls(recipe, config, tokenizer, {}, frozenset(given))
        for name, section in recipe.data.sources.items():
            bench.sources[name] = given.get(name) or invented_source(name, section, config, bench.texts, bench.tasks)
        return bench

    @property
    def texts(self) -> Texts:
        longest = min(self.recipe.data.max_text, self.config.max_positions)
        data = self.recipe.data
        return Texts(self.tokenizer, longest, data.max_answers, self.config.text_end, data.fused_share)

    @property
    def model(self) -> MplugModel:
        """The model on the meta device."""
        if not hasattr(self, "_model"):
            with hollow():
                self._model = MplugModel(self.config)
        return self._model

    @property
    def tasks(self) -> dict[str, Any]:
        if not hasattr(self, "_tasks"):
            caption = _WrittenCaptions()
            caption.reward = CaptionReward(self.tokenizer) if "self_critical" in self.recipe.wanted() else None
            with hollow():
                patches = PatchTask(self.config, self.model.visual.token_grid[0])
            self._tasks = {**TASKS, "caption": caption, "patches": patches}
        return self._tasks

    @property
    def stages(self) -> list[StageSection]:
        return self.recipe.stages or [StageSection(name="train")]

    def objectives_of(self, stage: StageSection) -> dict[str, float]:
        return {k: v for k, v in (stage.objectives or self.recipe.objectives).items() if v > 0}

    def sources_of(self, stage: StageSection) -> list[str]:
        return list(stage.sources or self.sources)

    def likeness(self, name: str) -> Any:
        """Equal for sources whose images cost the same: invented ones of the same tasks."""
        section = self.recipe.data.sources[name]
        if name in self.known:
            return name
        return (tuple(section.tasks.items()), section.text_only, bool(section.cached_views))

    def unread(self, name: str, stage: StageSection | None = None) -> Unread:
        """A source whose pictures are not opened, as ``stage`` (default: the first) draws from it."""
        visual, stages = self.model.visual, self.stages
        cells = visual.grid[0] * visual.grid[1] + int(visual.is_transformer)
        before = stages[: stages.index(stage)] if stage in stages else []
        cached = self.recipe.encoder_stays([*before, stage or stages[0]])
        return Unread(self.sources[name], self.config, cells, visual.width, cached)


@dataclass
class StepParts:
    """The modules of a step, on whatever device they are made on."""

    step: TrainStep
    teacher: Teacher | None
    queue: FeatureQueue | None

    def context(
        self, recipe: Recipe, batch: Batch, weights: Mapping[str, float], autocast: Callable[[], AbstractContextManager]
    ) -> Context:
        """What the losses of a batch see, in one process and with a teacher that is listened to."""
        alpha = recipe.teacher.alpha if self.teacher is not None else 0.0
        generator = torch.Generator().manual_seed(0)
        return build_context(recipe, batch, weights, alpha, self.teacher, self.queue, autocast, generator)


def build_parts(bench: Workbench, stage: StageSection, objectives: Mapping[str, float]) -> StepParts:
    """The modules of a step of ``stage`` with ``objectives``, frozen as the stage says; weights are random or, on the
    meta device, none."""
    recipe, config = bench.recipe, bench.config
    model = MplugModel(config)
    model.set_checkpointing(recipe.engine.checkpointing)
    tasks = bench.tasks | {"patches": PatchTask(config, model.visual.token_grid[0])}
    teacher, queue = build_teacher(model, recipe.teacher, objectives)
    step = TrainStep(model, tasks, StandIn(config.embed_dim) if config.summary_tokens else None).train()
    model.freeze(bench.recipe.frozen(stage))
    model.pooling = stage.pool
    return StepParts(step, teacher, queue)
