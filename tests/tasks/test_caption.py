"""Captioning: the reward of self-critical training and what it teaches, evaluation with and without references."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider as TheirCider

from mplug_core.data.batches import Drawn
from mplug_core.data.images import open_image
from mplug_core.data.records import CaptionRecord, read_captions
from mplug_core.data.text import Tokenizer, clean_caption
from mplug_core.errors import DataError, RecipeError
from mplug_core.generation import Decoding
from mplug_core.metrics import caption as metrics
from mplug_core.metrics.intervals import values
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.self_critical import write_captions
from mplug_core.recipe import DataSpec, SelfCriticalSection
from mplug_core.tasks import caption
from mplug_core.tasks.caption import CaptionReward, CaptionTask, compare_captions
from mplug_core.tasks.nearest import nearest_captions
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Texts
from mplug_core.training.trainer import Trainer
from tests.small import CNN, small_config, small_model
from tests.training.recipes import scene_recipe

SELF_CRITICAL = {"self_critical": 1.0}


@pytest.fixture(scope="module")
def records(scenes: Path) -> list[CaptionRecord]:
    return read_captions(scenes, "train").records


@pytest.fixture(scope="module")
def ready(tokenizer: Tokenizer) -> Ready:
    return Ready(small_model(vision=CNN, vocab_size=tokenizer.vocab_size, max_positions=64), tokenizer)


def prepared(records: list[CaptionRecord], tokenizer: Tokenizer) -> CaptionTask:
    task = CaptionTask()
    task.prepare(records, Texts(tokenizer, 40), ["self_critical"])
    return task


def drawn(records: list[CaptionRecord]) -> list[Drawn]:
    return [((row,), record) for row, record in enumerate(records)]


# -- the reward --------------------------------------------------------------------------------------------------------


def test_reward_is_the_packages_cider(records: list[CaptionRecord], tokenizer: Tokenizer) -> None:
    """On the corpus that weighs the words, for generated ids: the numbers of pycocoevalcap."""
    reward = prepared(records, tokenizer).reward
    said = [clean_caption(records[i - 1].captions[0]) for i in range(len(records))]
    written = [[tokenizer.encode(text)[1:]] for text in said]
    references = [[caption.caption_tokens(text) for text in record.captions] for record in records]
    truths = {i: [clean_caption(text, 1000) for text in record.captions] for i, record in enumerate(records)}
    _, expected = TheirCider().compute_score(truths, {i: [text] for i, text in enumerate(said)})
    found = [row[0] for row in reward(written, references, count_end=False)]
    assert found == pytest.approx(list(expected), abs=1e-9) and max(found) > 0.5
    ended = {i: [f"{text} [SEP]" for text in texts] for i, texts in truths.items()}
    _, expected = TheirCider().compute_score(ended, {i: [f"{text} [SEP]"] for i, text in enumerate(said)})
    assert [row[0] for row in reward(written, references)] == pytest.approx(list(expected), abs=1e-9)


def test_reward_counts_the_end(tokenizer: Tokenizer) -> None:
    texts = ["a small red circle above a blue square", "a large green cross", "a small yellow circle"]
    reward = CaptionReward(tokenizer)
    reward.count([[text] for text in texts])
    whole = tokenizer.encode(texts[0])[1:]
    broken = tokenizer.encode("a small red circle above a")[1:]
    references = [[caption.caption_tokens(texts[0])]]
    ((complete, halved, endless),) = reward([[whole, broken, whole[:-1]]], references)
    assert complete == pytest.approx(10) and complete > endless > halved
    ((_, generous, same),) = reward([[whole, broken, whole[:-1]]], references, count_end=False)
    assert generous > halved and same == pytest.approx(10)


def test_references_are_all_captions_of_the_image(records: list[CaptionRecord], tokenizer: Tokenizer) -> None:
    plain = CaptionTask().encode(drawn(records[:3]), random.Random(0), Texts(tokenizer, 40))
    assert "references" not in plain
    task = prepared(records, tokenizer)
    block = task.encode(drawn(records[:3]), random.Random(0), Texts(tokenizer, 40))
    assert [len(known) for known in block["references"]] == [len(record.captions) for record in records[:3]]
    assert block["references"][1][0] == tuple(clean_caption(records[1].captions[0]).split())
    assert task.reward.cider.images == len(records)


def test_nothing_is_counted_where_nothing_is_rewarded(records: list[CaptionRecord], tokenizer: Tokenizer) -> None:
    task = CaptionTask()
    task.prepare(records, Texts(tokenizer, 40), ["caption", "itc"])
    assert task.reward is None


def test_images_without_captions_are_not_trained_on(tokenizer: Tokenizer) -> None:
    bare = [CaptionRecord(Path("a.jpg"), ("a cat",), "a"), CaptionRecord(Path("b.jpg"), (), "b")]
    with pytest.raises(DataError, match="1 of 2 images have no caption to learn from; the first is b"):
        CaptionTask().prepare(bare, Texts(tokenizer, 40), ["caption"])


def test_one_word_beam_is_refused(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="captions must be 2 or more"):
        scene_recipe(scenes, tmp_path, "self_critical.captions=1")
    with pytest.raises(RecipeError, match="self_critical needs engine.zero_stage 2 or less"):
        scene_recipe(scenes, tmp_path, "engine.name=deepspeed", "engine.zero_stage=3", objectives=SELF_CRITICAL)


# -- training ----------------------------------------------------------------------------------------------------------


class Pupil:
    """A small captioner of six scenes that has learned some words, on cached features."""

    def __init__(self, records: list[CaptionRecord], tokenizer: Tokenizer) -> None:
        self.all, self.records, self.tokenizer = records, records[:6], tokenizer
        self.task = prepared(records, tokenizer)
        torch.manual_seed(0)
        self.model = MplugModel(
            small_config(
                vision={**CNN, "image_size": 48}, vocab_size=tokenizer.vocab_size, width=64, intermediate=128,
                fusion_layers=2, text_layers=1, decoder_layers=1, max_positions=64,
            )
        )  # fmt: skip
        with torch.no_grad():
            self.features = self.model.visual(torch.stack([pixels(record.image) for record in self.records]))
        self.block = self.task.encode(drawn(self.records), random.Random(0), Texts(tokenizer, 40))
        self.train({"caption": 1.0}, 18, 3e-3)

    def images(self) -> ImageEncoding:
        return self.model.encode_features(self.features)

    def train(self, weights: dict[str, float], steps: int, lr: float, **settings: Any) -> list[float]:
        """Rewards by step."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr, weight_decay=0)
        self.model.train()
        rewards = []
        for step in range(steps):
            context = Context(
                weights=weights,
                generator=torch.Generator().manual_seed(step),
                self_critical=SelfCriticalSection(**{"max_tokens": 10, **settings}),
            )
            loss = sum(self.task.losses(self.model, self.images(), self.block, context).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            rewards += context.figures.values()
        self.model.eval()
        return rewards

    def cider(self) -> float:
        """Mean reward of the captions of a beam search, by a reward that no control has touched."""
        settings = SelfCriticalSection(max_tokens=10)
        memory, mask = self.model.memory(self.images())
        written, _ = write_captions(
            self.model.decoder, memory, mask, settings, start=self.tokenizer.cls_id, end=self.tokenizer.sep_id
        )
        rewards = prepared(self.all, self.tokenizer).reward(written, self.block["references"])
        return float(np.mean(rewards))


def pixels(path: Path) -> torch.Tensor:
    image = np.asarray(open_image(path).resize((48, 48)), np.float32)
    return torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)


class Misjudged:
    """The true reward, changed row by row: a control that can teach nothing."""

    def __init__(self, true: CaptionReward, change: Callable[[list[float]], list[float]]) -> None:
        self.true, self.change, self.tokenizer = true, change, true.tokenizer

    def __call__(self, *given: Any) -> list[list[float]]:
        return [self.change(row) for row in self.true(*given)]


def test_captions_get_better(records: list[CaptionRecord], tokenizer: Tokenizer) -> None:
    """By the true reward; with the wrong sign, or with rewards of other captions, they don't."""
    pupil = Pupil(records, tokenizer)
    before, start = pupil.cider(), {name: value.clone() for name, value in pupil.model.state_dict().items()}
    rewards = pupil.train(SELF_CRITICAL, 20, 4e-4)
    gained = pupil.cider() - before
    assert gained > 0.3 and sum(rewards[-5:]) > sum(rewards[:5])
    shuffler, true = random.Random(0), pupil.task.reward
    for change in (lambda row: [-value for value in row], lambda row: shuffler.sample(row, len(row))):
        pupil.model.load_state_dict(start)
        pupil.task.reward = Misjudged(true, change)
        pupil.train(SELF_CRITICAL, 20, 4e-4)
        assert pupil.cider() - before < gained / 3


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.precision=bf16", "self_critical.variant=sample"),
        ("engine.name=deepspeed", "engine.precision=bf16", "engine.zero_stage=2"),
    ],
)
def test_a_run_rewards_captions(scenes: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Also in a later stage, whose model and tasks are made anew; nothing of it stays with the task that all share."""
    stages = [
        {"name": "words", "steps": 2, "objectives": {"caption": 1}},
        {"name": "captions", "steps": 2, "objectives": {"caption": 0.1, "self_critical": 1}},
    ]
    short = ("self_critical.max_tokens=8", "self_critical.captions=2", "data.sources.scenes.tasks={caption: 1}")
    recipe = scene_recipe(scenes, tmp_path / "run", *short, *overrides, stages=stages)
    trainer = Trainer(recipe, lambda kind, figures: None, "never")
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [("reward" in line, "self_critical" in line) for line in lines] == [(False, False)] * 2 + [(True, True)] * 2
    assert all(0 <= line["reward"] <= 10 and line["grad_norm"] > 0 for line in lines[2:])
    assert trainer.tasks["caption"].reward.cider.images == 40
    assert TASKS["caption"].reward is None


# -- evaluation --------------------------------------------------------------------------------------------------------

NOCAPS = (
    ("in-domain", "a red circle"), ("near-domain", "a blue square"), ("out-domain", "a cross"), ("in-domain", "x y")
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes seconds to start."""
    monkeypatch.setattr(metrics, "_meteor", lambda hypotheses, truths: np.ones((len(truths), 23)))


def stated(domain: str, *captions: str) -> SimpleNamespace:
    return SimpleNamespace(captions=captions, domain=domain, image_id="1")


def test_parts_of_nocaps(quick: None) -> None:
    """Means over the images of a part with all images' word weights, so that the parts average to the whole."""
    pairs = [(stated(domain, text, "a thing"), "a red circle near a square") for domain, text in NOCAPS]
    measures, notes = compare_captions(pairs)
    found = values(measures)
    each = list(
        metrics.cider_scores(
            {str(i): text for i, (_, text) in enumerate(pairs)},
            {str(i): list(record.captions) for i, (record, _) in enumerate(pairs)},
        ).values()
    )
    assert found["cider_in"] == pytest.approx((each[0] + each[3]) / 2) and found["cider_in"] > found["cider_out"]
    assert found["cider_near"] == pytest.approx(each[1]) and found["cider_out"] == pytest.approx(each[2])
    whole = (2 * found["cider_in"] + found["cider_near"] + found["cider_out"]) / 4
    assert found["cider"] == pytest.approx(whole)
    assert [note for note in notes if not note.startswith("SPICE is left out: ")] == []
    assert {name for name in found if name.endswith("_in")} <= {"cider_in", "spice_in"}


@pytest.mark.slow
def test_same_ids_and_empty_captions_are_scored() -> None:
    """Images of two folders with one name are two images, and an empty caption is a bad one."""
    pairs = [(stated("", "a cat on a mat", ""), ""), (stated("", "a dog in the rain"), "a dog in the rain")]
    found = values(compare_captions(pairs)[0])
    assert found["cider"] == pytest.approx(5) and 0 < found["meteor"] < 1
    assert not [name for name in found if "cider_" in name]


def test_images_without_references(quick: None) -> None:
    assert compare_captions([(stated(""), "a cat")]) == ({}, ["1 images have no captions to compare with"])
    with_one, notes = compare_captions([(stated(""), "a cat"), (stated("", "a dog"), "a dog")])
    assert values(with_one)["bleu_1"] == pytest.approx(1) and notes[0] == "1 images have no captions to compare with"


@pytest.fixture
def photos(scenes: Path, tmp_path: Path) -> Path:
    """Three images, of which the second has no caption: COCO's layout of ids, in JSON Lines."""
    images = [record.image for record in read_captions(scenes, "train").records[:3]]
    lines = [{"image": str(image), "image_id": f"00{i}", "caption": "a red circle"} for i, image in enumerate(images)]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


def test_evaluation_of_a_test_split(ready: Ready, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = read_captions(photos / "captions.jsonl")
    bare = [CaptionRecord(record.image, (), f"00{i}") for i, record in enumerate(records.records)]
    given = SimpleNamespace(records=bare, source=records.source, missing=[], broken=[])
    monkeypatch.setattr(CaptionTask, "read", lambda self, spec: given)
    result = CaptionTask().evaluate(ready, DataSpec(path="x"), EvaluateOptions(decoding=Decoding(strategy="greedy")))
    assert (result.n, result.metrics) == (3, {}) and result.notes == ["3 images have no captions to compare with"]
    assert {"image", "image_id", "caption", "score", "confidence"} <= result.predictions[0].keys()
    submitted = CaptionTask().submission(result.predictions)
    assert [entry["image_id"] for entry in submitted] == [0, 1, 2]
    assert all(entry.keys() == {"image_id", "caption"} for entry in submitted)


def test_submission_has_one_caption_an_image() -> None:
    said = [("000000391895", "a"), ("photo.jpg", "b"), ("391895", "c"), ("\u0663", "d")]
    found = CaptionTask().submission([{"image_id": name, "caption": text} for name, text in said])
    assert found == [
        {"image_id": 391895, "caption": "a"},
        {"image_id": "photo.jpg", "caption": "b"},
        {"image_id": "\u0663", "caption": "d"},
    ]


def test_notes_name_what_is_left_out(ready: Ready, photos: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_spice", lambda *given: (_ for _ in ()).throw(metrics.MplugError("no models")))
    spec = DataSpec(path=str(photos / "captions.jsonl"))
    result = CaptionTask().evaluate(ready, spec, EvaluateOptions(decoding=Decoding(strategy="greedy")))
    assert result.notes == ["SPICE is left out: no models"] and "cider" in result.metrics


def test_nearest_photo(ready: Ready, photos: Path, quick: None) -> None:
    """Each photo but itself; captions that are not there are not repeated."""
    spec = DataSpec(path=str(photos / "captions.jsonl"))
    result = nearest_captions(ready, spec, spec)
    assert result.n == 3 and result.metrics["bleu_1"] == pytest.approx(1)
    assert all(entry["nearest"] != entry["image"] for entry in result.predictions)
    assert len(CaptionTask().submission(result.predictions)) == 3
