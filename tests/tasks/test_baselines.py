"""Baselines: the numbers that a hand computes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from mplug_core.errors import DataError, UsageError
from mplug_core.recipe import DataSpec
from mplug_core.tasks.baselines import baseline, best_box
from mplug_core.tasks.task import EvaluateOptions
from tests.tasks.test_evaluation import train as training


def spec(folder: Path, name: str, entries: list[dict]) -> DataSpec:
    for entry in entries:
        (folder / entry["image"]).touch()
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return DataSpec(path=str(folder / name))


def questions(folder: Path, name: str, pairs: list[tuple[str, str]]) -> DataSpec:
    entries = [{"image": f"{i}.png", "question": q, "answer": a} for i, (q, a) in enumerate(pairs)]
    return spec(folder, name, entries)


TRAIN = [
    ("what color is the car?", "red"), ("what color is the bus?", "red"), ("what is on it?", "cup"),
    ("how many cars are there?", "2"), ("how many cats are there?", "2"), ("how many cats?", "3"),
    ("is it day?", "yes"), ("is it night?", "yes"), ("is it night?", "yes"), ("is it dusk?", "yes"),
]  # fmt: skip
ASKED = [
    ("how many cats are there?", "2"),
    ("What color is it?", "red"),
    ("what", "red"),
    ("who?", "yes"),
    ("is?", "no"),
]


def test_majority_and_prior_answers(tmp_path: Path) -> None:
    train, asked = questions(tmp_path, "train.jsonl", TRAIN), questions(tmp_path, "val.jsonl", ASKED)
    majority = baseline("majority", "vqa", train, asked)
    assert {p["answer"] for p in majority.predictions} == {"yes"}
    assert majority.metrics["accuracy"] == pytest.approx(1 / 5) and majority.n == 5
    prior = baseline("prior", "vqa", train, asked)
    # three words "how many cats": 2 and 3 tie, the first in the alphabet; "is?" is no "is": the majority
    assert [p["answer"] for p in prior.predictions] == ["2", "red", "red", "yes", "yes"]
    assert prior.metrics["accuracy"] == pytest.approx(4 / 5)
    assert baseline("majority", "vqa", train, asked, EvaluateOptions(limit=2)).n == 2


def test_prior_of_questions_without_an_answer(tmp_path: Path) -> None:
    train = questions(tmp_path, "train.jsonl", [("is it day?", "yes"), ("who is this?", None)])
    asked = questions(tmp_path, "val.jsonl", [("who is this?", "yes")])
    assert [p["answer"] for p in baseline("prior", "vqa", train, asked).predictions] == ["yes"]


def test_majority_label(tmp_path: Path) -> None:
    def entailments(name: str, labels: str) -> DataSpec:
        words = {"e": "entailment", "n": "neutral", "c": "contradiction"}
        return spec(
            tmp_path,
            name,
            [{"image": f"{i}.png", "hypothesis": f"h{i}", "label": words[k]} for i, k in enumerate(labels)],
        )

    found = baseline("majority", "entailment", entailments("t.jsonl", "nneec"), entailments("v.jsonl", "eecn"))
    # entailment and neutral tie: the first in the alphabet
    assert found.metrics["accuracy"] == 0.5 and found.metrics["accuracy_entailment"] == 1
    assert found.metrics["accuracy_neutral"] == 0


def test_constant_box(tmp_path: Path) -> None:
    def phrases(name: str, boxes: list[list[int]]) -> DataSpec:
        entries = [
            {"image": f"{i}.png", "phrase": f"p{i}", "box": box, "size": [100, 100]} for i, box in enumerate(boxes)
        ]
        return spec(tmp_path, name, entries)

    train = phrases("t.jsonl", [[0, 0, 50, 50], [0, 0, 52, 52], [0, 0, 48, 48], [80, 80, 90, 90]])
    found = baseline("constant_box", "grounding", train, phrases("v.jsonl", [[0, 0, 50, 50], [80, 80, 90, 90]]))
    assert (found.predictions[0]["box"], found.predictions[0]["size"]) == ([0, 0, 50, 50], [100, 100])
    assert found.predictions[1]["truth"] == [80, 80, 90, 90]
    assert found.metrics == {"accuracy_iou50": 0.5, "iou": 0.5}


def test_random_order_is_what_shuffling_gives(tmp_path: Path) -> None:
    texts = [["a", "b"], ["c"], ["d"], ["a"], ["e", "f", "g"]]
    entries = [{"image": f"{i}.png", "caption": captions} for i, captions in enumerate(texts)]
    found = baseline("random", "retrieval", None, spec(tmp_path, "c.jsonl", entries)).metrics
    owners = [(text, i) for i, captions in enumerate(texts) for text in captions]
    rng, trials, hits = random.Random(0), 20000, {"i2t_r1": 0, "t2i_r1": 0, "i2t_r5": 0}
    for _ in range(trials):
        order = rng.sample(owners, len(owners))
        image = rng.randrange(len(texts))
        hits["i2t_r1"] += order[0][1] == image
        hits["i2t_r5"] += any(owner == image for _, owner in order[:5])
        hits["t2i_r1"] += rng.choice(owners)[1] == rng.randrange(len(texts))
    for name, count in hits.items():
        assert found[name] == pytest.approx(count / trials, abs=0.015), name
    assert found["i2t_r10"] == found["t2i_r5"] == 1
    assert found["r_mean"] == pytest.approx(sum(found[k] for k in found if k != "r_mean") / 6)


def test_faults(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vqa has no baseline 'majorty', did you mean 'majority'"):
        baseline("majorty", "vqa", training(scenes), training(scenes))
    hidden = questions(tmp_path, "t.jsonl", [("what?", None)])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no answers or labels to repeat"):
        baseline("majority", "vqa", hidden, training(scenes))


@pytest.mark.parametrize(
    ("task", "name", "entries"),
    [
        ("vqa", "majority", [{"question": "what?", "answer": "red"}]),
        ("vqa", "prior", [{"question": "what?", "answer": "red"}]),
        ("statements", "majority", [{"statement": "a dog", "label": True}]),
        ("entailment", "majority", [{"hypothesis": "a dog", "label": "neutral"}]),
        ("grounding", "constant_box", [{"phrase": "a dog", "box": [0, 0, 3, 4], "size": [8, 8]}]),
        ("retrieval", "random", [{"caption": "a dog"}]),
    ],
)
def test_of_texts_alone_no_image_has_to_be_there(tmp_path: Path, task: str, name: str, entries: list[dict]) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps({"image": f"{i}.png", **e}) + "\n" for i in range(3) for e in entries))
    given = DataSpec(path=str(file))
    found = baseline(name, task, given, given)
    assert (found.n, found.skipped) == (3, 0) and all(value > 0 for value in found.metrics.values())
    assert found.intervals().keys() == found.metrics.keys()
    # beside a model: on what it has answered
    assert baseline(name, task, given, given, records=found.records[:2]).n == 2


@pytest.mark.parametrize("seed", range(3))
def test_no_training_box_is_better_than_the_constant_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.beta(2, 2 + seed, size=(700, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1) + 0.02], 1).clip(0, 1)
    best = best_box(boxes)

    def met(box: list[float]) -> int:
        low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
        common = (high - low).clip(0).prod(1)
        joint = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2] - box[0]) * (box[3] - box[1]) - common
        return int((common / joint >= 0.5).sum())

    assert met(best) >= max(met(box.tolist()) for box in boxes) and min(best) >= 0 and max(best) <= 1
