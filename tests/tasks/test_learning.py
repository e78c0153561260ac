"""Each task can learn: a small model drives sixteen records to their targets, and every one of its answers is right."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mplug_core.data.batches import Drawn, image_keys
from mplug_core.data.images import eval_transform, open_image
from mplug_core.data.records import StatementRecord, read_entailments
from mplug_core.data.text import Tokenizer, clean_caption
from mplug_core.generation import Decoding
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.box import bins_to_box, box_iou, box_to_bins
from mplug_core.recipe import DataSpec
from mplug_core.tasks.caption import describe
from mplug_core.tasks.grounding import find_boxes
from mplug_core.tasks.reasoning import LABELS, judge
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.task import Context, Ready, Texts
from mplug_core.tasks.vqa import answer_questions, rank_answers
from tests.small import CLASSIFIERS, CNN, small_config

SIZE = 48
COUNT = 16


class Lesson:
    """Records of a task, their images, and a model that is trained on them."""

    def __init__(self, tokenizer: Tokenizer, task: str, records: Sequence[Any], count: int, seed: int = 0) -> None:
        self.task = TASKS[task]
        seen: dict[Any, int] = {}
        self.drawn: list[Drawn] = []
        texts: set[str] = set()
        for record in records:
            text = str(next(v for k, v in vars(record).items() if k not in ("image", "images")))
            if len(self.drawn) < count and text not in texts:
                texts.add(text)
                self.drawn.append((tuple(seen.setdefault(key, len(seen)) for key in image_keys(record)), record))
        assert len(self.drawn) == count
        transform = eval_transform(SIZE, (0.5,) * 3, (0.5,) * 3)
        self.pixels = torch.stack([transform(open_image(path)) for path in seen])
        torch.manual_seed(seed)
        config = small_config(
            vision={**CNN, "image_size": SIZE}, vocab_size=tokenizer.vocab_size, box_bins=tokenizer.bins,
            classifiers=CLASSIFIERS, width=64, intermediate=128, fusion_layers=2, text_layers=1, max_positions=64,
        )  # fmt: skip
        self.model = MplugModel(config)
        self.ready = Ready(self.model, tokenizer)
        with torch.no_grad():  # the backbone stays as it is, which makes a lesson four times as fast
            self.features = self.model.visual(self.pixels)
        self.texts = Texts(tokenizer, 64)

    @property
    def rows(self) -> list[tuple[int, ...]]:
        return [rows for rows, _ in self.drawn]

    @property
    def first(self) -> list[int]:
        """The row of each record's only image."""
        return [row for (row,) in self.rows]

    def fields(self, name: str) -> list[Any]:
        """This field of all records."""
        return [getattr(record, name) for _, record in self.drawn]

    def learn(self, steps: int, objectives: tuple[str, ...] | None = None, lr: float = 3e-3) -> float:
        """Plain AdamW; returns the last loss."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr, weight_decay=0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
        weights = dict.fromkeys(objectives or self.task.objectives, 1.0)
        self.model.train()
        loss = torch.zeros(())
        block = self.task.encode(self.drawn, random.Random(0), self.texts)
        for step in range(steps):
            context = Context(
                weights=weights, image_ids=torch.arange(len(self.pixels)), generator=torch.Generator().manual_seed(step)
            )
            loss = sum(self.task.losses(self.model, self.model.encode_features(self.features), block, context).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        self.model.eval()
        return float(loss.detach())

    def images(self) -> ImageEncoding:
        return self.model.encode_image(self.pixels)


@pytest.fixture
def lesson(scenes: Path, tokenizer: Tokenizer) -> Callable[..., Lesson]:
    """``lesson("vqa")``: on the first records of the scenes, or on those given."""

    def make(task: str, count: int = COUNT, records: Sequence[Any] | None = None) -> Lesson:
        if records is None:
            records = list(TASKS[task].read(DataSpec(path=str(scenes), split="train")))
        return Lesson(tokenizer, task, records, count)

    return make


@pytest.fixture
def single_statements(scenes: Path) -> list[StatementRecord]:
    """What an image entails is true of it, and what it contradicts is false."""
    truth = {"entailment": True, "contradiction": False}
    return [
        StatementRecord((record.image,), record.hypothesis, truth[record.label])
        for record in read_entailments(scenes, "train")
        if record.label in truth
    ]


def test_captions(lesson: Callable[..., Lesson]) -> None:
    pupil = lesson("caption")
    pupil.learn(120, ("caption",))
    rng = random.Random(0)
    wanted = [clean_caption(rng.choice(captions)) for captions in pupil.fields("captions")]
    for decoding in (Decoding(strategy="greedy", max_tokens=40), Decoding(beams=3, max_tokens=40)):
        found = describe(pupil.ready, pupil.images(), decoding)
        assert [row[0].text for row in found] == wanted
        assert all(row[0].confidence > 0.5 for row in found)


def test_answers(lesson: Callable[..., Lesson]) -> None:
    pupil = lesson("vqa")
    pupil.learn(100)
    questions, wanted = pupil.fields("question"), [answers[0] for answers in pupil.fields("answers")]
    greedy = Decoding(strategy="greedy", max_tokens=5)
    found = answer_questions(pupil.ready, pupil.images(), pupil.first, questions, greedy)
    ranked = rank_answers(pupil.ready, pupil.images(), pupil.first, questions, sorted(set(wanted)))
    assert len(set(wanted)) > 3
    assert [row[0].text for row in found] == [row[0].text for row in ranked] == wanted


def test_boxes(lesson: Callable[..., Lesson]) -> None:
    pupil = lesson("grounding")
    pupil.learn(150)
    boxes, confidence = find_boxes(pupil.ready, pupil.images(), pupil.first, pupil.fields("phrase"))
    truth = torch.tensor(pupil.fields("box"))
    bins = pupil.ready.tokenizer.bins
    assert boxes.shape == (COUNT, 4) and (boxes >= 0).all() and (boxes <= 1).all()
    assert (confidence > 0.5).all() and (confidence <= 1).all()
    # right to the token; with 16 bins a small box loses some of its overlap to rounding
    assert torch.allclose(boxes, bins_to_box(box_to_bins(truth, bins), bins, 0.5))
    assert (box_iou(boxes, truth) >= 0.5).all()


@pytest.mark.parametrize("kind", ["statements", "single statements", "entailment"])
def test_labels(lesson: Callable[..., Lesson], single_statements: list[StatementRecord], kind: str) -> None:
    pupil = lesson("statements", records=single_statements) if kind == "single statements" else lesson(kind)
    pupil.learn(100)
    assert {len(rows) for rows in pupil.rows} == {2 if kind == "statements" else 1}
    classifier = pupil.task.classifier
    texts = pupil.fields("hypothesis" if kind == "entailment" else "statement")
    found = judge(pupil.ready, classifier, pupil.images(), pupil.rows, texts)
    wanted = [str(label).lower() for label in pupil.fields("label")]
    assert set(wanted) == set(LABELS[classifier])
    assert [LABELS[classifier][label] for label in found.argmax(-1)] == wanted
    assert (found.max(-1).values > 0.9).all()


def test_retrieval(lesson: Callable[..., Lesson]) -> None:
    """Recall at 1 of contrast alone, both ways."""
    pupil = lesson("retrieval")
    pupil.learn(60, ("itc",))
    block = pupil.task.encode(pupil.drawn, random.Random(0), pupil.texts)
    with torch.no_grad():
        text = pupil.model.encode_text(block["ids"], block["mask"])
        similarity = pupil.model.text_feature(text, block["mask"]) @ pupil.images().feature.T
    assert similarity.argmax(1).tolist() == list(range(COUNT)) == similarity.argmax(0).tolist()


def test_matching(lesson: Callable[..., Lesson]) -> None:
    """Without a contrastive loss negatives are drawn evenly, so that every wrong pair of eight is seen."""
    pupil = lesson("pretrain", 8)
    pupil.learn(150, ("itm",))
    block = pupil.task.encode(pupil.drawn, random.Random(0), pupil.texts)
    with torch.no_grad():
        images, text = pupil.images(), pupil.model.encode_text(block["ids"], block["mask"])
        texts, which = (grid.flatten() for grid in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
        _, fused = pupil.model.fuse(images[which], text[texts], block["mask"][texts])
        match = pupil.model.matching_logits(fused).argmax(-1).view(8, 8)
    assert torch.equal(match, torch.eye(8).long())


def test_masked_words_and_the_rest_of_captions(lesson: Callable[..., Lesson]) -> None:
    pupil = lesson("pretrain", 8)
    assert pupil.learn(100, ("mlm", "prefix_lm")) < 0.1


def gradient_parts(model: MplugModel) -> set[str]:
    """Children of the model that a backward pass has reached."""
    return {
        name
        for name, child in model.named_children()
        if any(p.grad is not None and bool((p.grad != 0).any()) for p in child.parameters())
    }


SHARED = {"visual", "visual_projection"}


@pytest.mark.parametrize(
    ("task", "objective", "parts"),
    [
        # of a convolutional backbone the contrastive head reads the pooled grid itself
        ("pretrain", "itc", {"visual", "image_projection", "text", "text_projection"}),
        ("pretrain", "itm", SHARED | {"text", "fusion", "matching_head"}),
        ("pretrain", "mlm", SHARED | {"text", "fusion", "masked_head"}),
        ("pretrain", "prefix_lm", SHARED | {"text", "fusion", "decoder"}),
        ("caption", "caption", SHARED | {"decoder"}),
        ("vqa", "answer", SHARED | {"text", "fusion", "decoder"}),
        ("grounding", "box", SHARED | {"text", "fusion", "decoder"}),
        ("statements", "statement", SHARED | {"text", "fusion", "classifiers"}),
        ("entailment", "entailment", SHARED | {"text", "fusion", "classifiers"}),
    ],
)
def test_gradient_reaches_what_it_should(
    lesson: Callable[..., Lesson], task: str, objective: str, parts: set[str]
) -> None:
    pupil = lesson(task)
    block = pupil.task.encode(pupil.drawn, random.Random(0), pupil.texts)
    context = Context(weights={objective: 1.0}, image_ids=torch.arange(len(pupil.pixels)))
    losses = pupil.task.losses(pupil.model, pupil.images(), block, context)
    assert set(losses) == {objective} and losses[objective].dim() == 0
    losses[objective].backward()
    assert gradient_parts(pupil.model) == parts
    # hard negatives are chosen by similarity, without a gradient
    assert (pupil.model.temperature.grad is not None) == (objective == "itc")


@pytest.mark.parametrize("task", ["pretrain", "caption", "vqa", "grounding", "statements", "entailment"])
def test_objective_without_weight_is_not_computed(lesson: Callable[..., Lesson], task: str) -> None:
    pupil = lesson(task)
    block: dict[str, Tensor] = pupil.task.encode(pupil.drawn, random.Random(0), pupil.texts)
    context = Context(weights={"patches": 1.0}, image_ids=torch.arange(len(pupil.pixels)))
    assert pupil.task.losses(pupil.model, pupil.images(), block, context) == {}


def test_stand_ins_take_no_part_in_pairs(lesson: Callable[..., Lesson]) -> None:
    pupil = lesson("pretrain")
    block = pupil.task.encode(pupil.drawn, random.Random(0), pupil.texts)
    context = Context(weights=dict.fromkeys(pupil.task.objectives, 1.0), image_ids=None)
    assert set(pupil.task.losses(pupil.model, pupil.images(), block, context)) == {"mlm", "prefix_lm"}
