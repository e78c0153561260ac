"""Grounding: answers come back in the picture however it was fitted, broken boxes spoil no loss, baselines by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mplug_core.data.placement import Placement
from mplug_core.data.records import PhraseRecord
from mplug_core.data.text import Tokenizer
from mplug_core.objectives.box import bins_to_box, box_to_bins, box_token_loss
from mplug_core.recipe import DataSpec
from mplug_core.tasks import grounding
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.grounding import GroundingTask, decode_bins, draw_bins, find_boxes, safest
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Texts
from tests.small import CNN, random_inputs, small_model

PHOTO = Path("photo.jpg")


def make_ready(tokenizer: Tokenizer, **vision: Any) -> Ready:
    model = small_model(
        vision={**CNN, **vision}, vocab_size=tokenizer.vocab_size, box_bins=tokenizer.bins, max_positions=64
    )
    return Ready(model, tokenizer)


@pytest.fixture(scope="module")
def ready(tokenizer: Tokenizer) -> Ready:
    return make_ready(tokenizer)


@pytest.fixture
def wide(tmp_path: Path) -> DataSpec:
    """A picture of 80 x 40 pixels with three phrases and a square one with another."""
    Image.new("RGB", (80, 40)).save(tmp_path / "wide.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "square.png")
    lines = [
        {"image": "wide.png", "phrase": "the red circle", "box": [20, 10, 60, 30], "size": [80, 40]},
        {"image": "wide.png", "phrase": "the square", "box": [0, 0, 80, 40], "size": [80, 40]},
        {"image": "square.png", "phrase": "the circle", "box": [10, 20, 30, 40], "size": [50, 50]},
        {"image": "wide.png", "phrase": "a blue circle", "box": [60, 0, 80, 40], "size": [80, 40]},
    ]
    (tmp_path / "phrases.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return DataSpec(path=str(tmp_path / "phrases.jsonl"))


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_answers_are_in_the_picture(
    tokenizer: Tokenizer, wide: DataSpec, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A perfect finder says where the thing is in the model's square; the scores are then perfect, too."""
    ready = make_ready(tokenizer, fit=fit)
    task = GroundingTask()
    records = task.read(wide).records
    shares = {record.phrase: record.box for record in records}

    def perfect(ready: Ready, images: Any, rows: Any, phrases: Any, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        boxes = []
        for phrase in phrases:
            x0, y0, x1, y1 = shares[phrase]
            padded = fit == "pad" and phrase != "the circle"  # 80 x 40: a quarter above and below
            boxes.append([x0, 0.25 + y0 / 2, x1, 0.25 + y1 / 2] if padded else [x0, y0, x1, y1])
        return torch.tensor(boxes), torch.full((len(phrases),), 0.5)

    monkeypatch.setattr(grounding, "find_boxes", perfect)
    result = task.evaluate(ready, wide, EvaluateOptions(batch_size=1))
    assert result.metrics == {"accuracy_iou50": 1.0, "iou": pytest.approx(1.0), "ece": 0.5} and result.n == 4
    assert {tuple(prediction["size"]) for prediction in result.predictions} == {(80, 40), (50, 50)}
    for prediction in result.predictions:
        # in pixels of a picture of this size
        box = [value / side for value, side in zip(prediction["box"], prediction["size"] * 2, strict=True)]
        assert box == pytest.approx(shares[prediction["phrase"]], abs=2e-4)
        assert prediction["truth"] == pytest.approx(prediction["box"], abs=0.011)
        assert prediction["confidence"] == 0.5 and prediction["right"] is True


def test_evaluation_says_where_pictures_lie(tokenizer: Tokenizer, wide: DataSpec) -> None:
    evaluation = Evaluation(make_ready(tokenizer, fit="pad"), GroundingTask().read(wide).records)
    ((images, drawn),) = evaluation
    assert len(images) == 2 and [row for (row,), _ in drawn] == [0, 0, 1, 0]
    assert evaluation.placements == [Placement(1.0, 0.5, 0.0, 0.25), Placement()]


def test_training_and_testing_see_the_same_boxes(tokenizer: Tokenizer) -> None:
    """What encode writes as tokens is what the middle of the bins gives back, within a bin."""
    record = PhraseRecord(PHOTO, "the red circle", (0.25, 0.3, 0.65, 0.9))
    block = GroundingTask().encode([((0,), record)], random.Random(0), Texts(tokenizer, 20))
    back = bins_to_box(block["bins"], tokenizer.bins, 0.5)[0]
    assert (back - torch.tensor(record.box)).abs().max() <= 1 / (tokenizer.bins - 1)
    assert block["inputs"][0].tolist() == [tokenizer.cls_id, *(tokenizer.box_id(int(b)) for b in block["bins"][0, :3])]


def test_find_boxes_without_draws_is_greedy_over_box_tokens(ready: Ready) -> None:
    """The same four tokens and their probabilities from the decoder without a cache."""
    images, _, _ = random_inputs(ready.model)
    phrases = ["the red circle", "a large blue square", "the circle", "the red circle"]
    where = [0, 1, 2, 2]
    boxes, confidence = find_boxes(ready, images, where, phrases, draws=0)
    tokenizer, model = ready.tokenizer, ready.model
    ids, mask = ready.texts.encode(phrases)
    with torch.no_grad():
        memory, memory_mask = model.memory(images[torch.tensor(where)], model.encode_text(ids, mask), mask)
        box_ids = torch.tensor([tokenizer.box_id(b) for b in range(tokenizer.bins)])
        tokens, product = torch.full((4, 1), tokenizer.cls_id), torch.ones(4)
        for _ in range(4):
            scores = model.decode(tokens, memory, memory_mask)[:, -1, box_ids].softmax(-1)
            best = scores.argmax(-1)
            product = product * scores.max(-1).values
            tokens = torch.cat([tokens, box_ids[best][:, None]], 1)
        _, other = decode_bins(model, memory, memory_mask, box_ids, tokenizer.sep_id)
    bins = torch.tensor([[tokenizer.box_bin(int(t)) for t in row] for row in tokens[:, 1:]])
    assert torch.equal(boxes, bins_to_box(bins, tokenizer.bins, 0.5))
    assert torch.allclose(confidence, product**0.25, atol=1e-5)
    assert boxes.shape == (4, 4)
    assert (confidence[0] - confidence[3]).abs() > 1e-4, "the row of the image counts"
    assert ((other - confidence).abs() > 1e-4).any(), "the decoder's start counts"


def test_draws_have_the_models_distribution(ready: Ready) -> None:
    images, _, _ = random_inputs(ready.model)
    tokenizer, model = ready.tokenizer, ready.model
    ids, mask = ready.texts.encode(["the red circle", "a square"])
    box_ids = torch.tensor([tokenizer.box_id(b) for b in range(tokenizer.bins)])
    with torch.no_grad():
        memory, memory_mask = model.memory(images[torch.tensor([0, 1])], model.encode_text(ids, mask), mask)
        drawn = draw_bins(model, memory, memory_mask, box_ids, tokenizer.cls_id, 400)
        alone = draw_bins(model, memory[1:], memory_mask[1:], box_ids, tokenizer.cls_id, 400)
        first = model.decode(torch.full((2, 1), tokenizer.cls_id), memory, memory_mask)[:, -1, box_ids].softmax(-1)
    assert drawn.shape == (2, 400, 4) and torch.equal(drawn[1:], alone), "the batch changes nothing"
    counts = torch.stack([torch.bincount(row, minlength=tokenizer.bins) for row in drawn[..., 0]])
    # spread evenly: each count is within one of its expectation on either side of the bin
    assert ((counts / 400 - first).abs() <= 2 / 400).all()


def test_the_safest_box_overlaps_most_of_the_drawn() -> None:
    """A model that is sure of nothing but the middle names many small boxes there: the box around them is safer."""
    small, large = [0.4, 0.4, 0.5, 0.5], [0.2, 0.2, 0.8, 0.8]
    drawn = torch.tensor([[small, large, [0.2, 0.2, 0.8, 0.7], [0.25, 0.2, 0.8, 0.8]]])
    box, share = safest(torch.tensor([small]), drawn)
    assert box[0].tolist() == pytest.approx(large) and share.item() == 0.75
    box, share = safest(torch.tensor([small]), torch.tensor([[small] * 3]))
    assert box[0].tolist() == pytest.approx(small) and share.item() == 1


def test_loss_of_boxes_that_are_none(ready: Ready) -> None:
    """What gets past readers and batches all the same never makes the loss NaN, nor an index of nowhere."""
    nan, inf = float("nan"), float("inf")
    boxes = [(0.5, 0.5, 0.5, 0.5), (nan, 0, 1, 1), (2, 2, 3, 3), (-5, -5, -4, -4), (inf, -inf, inf, inf), (1, 1, 0, 0)]
    drawn = [((0,), PhraseRecord(PHOTO, "the circle", box)) for box in boxes]
    task = GroundingTask()
    block = task.encode(drawn, random.Random(0), ready.texts)
    assert block["bins"].min() >= 0 and block["bins"].max() < ready.tokenizer.bins
    images, _, _ = random_inputs(ready.model)
    loss = task.losses(ready.model, images, block, Context(weights={"box": 1.0}))["box"]
    assert loss.isfinite()
    ready.model.zero_grad()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in ready.model.parameters() if p.grad is not None)


def test_weights_of_the_loss_are_the_tasks(ready: Ready) -> None:
    images, _, _ = random_inputs(ready.model)
    drawn = [((k,), PhraseRecord(PHOTO, "the circle", (0.1 * k, 0.2, 0.9, 0.7))) for k in range(3)]
    task = GroundingTask()
    block = task.encode(drawn, random.Random(0), ready.texts)
    text = ready.model.encode_text(block["ids"], block["mask"])
    memory, mask = ready.model.memory(images[block["image"]], text, block["mask"])
    logits = ready.model.decode(block["inputs"], memory, mask)
    for weights in ({}, {"base": 0.0}, {"l1": 0.0}, {"giou": 3.0}):
        vars(task).clear()
        vars(task).update(weights)
        given = {"base": 1.0, "l1": 1.0, "giou": 1.0, **weights}
        loss = task.losses(ready.model, images, block, Context(weights={"box": 1.0}))["box"]
        assert loss.item() == pytest.approx(box_token_loss(logits, block["bins"], block["box_ids"], **given).item())


def test_boxes_survive_the_square() -> None:
    """Whatever the number of bins, the tokens of a whole picture are a whole picture."""
    for bins in (2, 16, 337):
        whole = bins_to_box(box_to_bins(torch.tensor([0.0, 0.0, 1.0, 1.0]), bins), bins)
        assert (whole[2:] - whole[:2]).min() >= 1 - 1 / (bins - 1)
