"""Baselines: the numbers that a hand computes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mplug_core.errors import DataError, UsageError
from mplug_core.recipe import DataSpec
from mplug_core.tasks.baselines import baseline
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
    assert found.predictions[0]["box"] == [0, 0, 0.5, 0.5]
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
