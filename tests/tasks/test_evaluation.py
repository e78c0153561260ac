"""Evaluation: broken images are counted, never hidden; scores are those computed by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mplug_core.data.text import Tokenizer
from mplug_core.errors import CheckpointError, DataError, UsageError
from mplug_core.generation import Decoding
from mplug_core.recipe import DataSpec
from mplug_core.tasks.caption import caption_images, forbidden_tokens
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.registry import EVALUATED, TASKS, evaluated_task
from mplug_core.tasks.task import EvaluateOptions, Ready, rows
from tests.small import CLASSIFIERS, CNN, small_model


def train(folder: Path) -> DataSpec:
    return DataSpec(path=str(folder), split="train")


@pytest.fixture(scope="module")
def ready(tokenizer: Tokenizer) -> Ready:
    model = small_model(
        vision=CNN, vocab_size=tokenizer.vocab_size, box_bins=tokenizer.bins, classifiers=CLASSIFIERS, max_positions=64
    )
    return Ready(model, tokenizer)


@pytest.fixture
def damaged(scenes: Path, tmp_path: Path) -> Path:
    """Twenty scenes, the first image cut short and the second gone."""
    train = tmp_path / "d" / "train"
    (train / "images").mkdir(parents=True)
    for name in ("captions", "questions", "phrases", "statements", "entailments", "scenes"):
        kept = [
            line
            for line in (scenes / "train" / f"{name}.jsonl").read_text().splitlines()
            if all(int(Path(p).stem) < 20 for p in json.loads(line).get("images", [json.loads(line).get("image")]))
        ]
        if name == "entailments":  # not every scene has one
            kept.append(json.dumps({"image": "images/000000.jpg", "hypothesis": "a circle", "label": "neutral"}))
        (train / f"{name}.jsonl").write_text("\n".join(kept))
    for image in sorted((scenes / "train" / "images").iterdir())[:20]:
        shutil.copy(image, train / "images")
    first, second, *_ = sorted((train / "images").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    return tmp_path / "d"


@pytest.mark.parametrize("task", EVALUATED)
def test_broken_and_missing_images_are_counted(ready: Ready, damaged: Path, task: str) -> None:
    options: dict[str, Any] = (
        {"decoding": Decoding(strategy="greedy", max_tokens=4)} if task in ("caption", "vqa") else {}
    )
    result = evaluated_task(task).evaluate(ready, train(damaged), EvaluateOptions(batch_size=7, **options))
    records = 18 if task in ("caption", "retrieval") else None
    if records:
        assert (result.n, result.skipped) == (18, 2)
    assert result.n > 0 and result.skipped > 0 and result.task == task
    assert result.metrics and all(0 <= value <= 1 for value in result.metrics.values()), result.metrics
    # of retrieval every caption is a query, too
    assert (len(result.predictions) in (0, result.n) or task == "retrieval") and result.seconds > 0
    shown = json.dumps(result.predictions)
    assert "000000." not in shown and "000001." not in shown


def test_chunks_have_at_most_batch_size_images_and_keep_the_order(ready: Ready, scenes: Path) -> None:
    records = list(TASKS["statements"].read(train(scenes)))[:11]
    evaluation = Evaluation(ready, records, batch_size=5)
    seen = []
    for images, drawn in evaluation:
        assert len(images) <= 5
        assert rows(drawn).shape == (len(drawn), 2)
        seen += [record for _, record in drawn]
    assert seen == records and evaluation.n == 11


def test_batch_size_changes_no_answer(ready: Ready, scenes: Path) -> None:
    results = [
        TASKS["vqa"].evaluate(ready, train(scenes), EvaluateOptions(limit=30, batch_size=size)).predictions
        for size in (1, 16)
    ]
    assert results[0] == results[1]


def test_limit_is_a_number_of_records(ready: Ready, scenes: Path) -> None:
    assert TASKS["vqa"].evaluate(ready, train(scenes), EvaluateOptions(limit=5)).n == 5


@pytest.mark.parametrize("task", EVALUATED)
def test_no_readable_image_is_an_error(ready: Ready, damaged: Path, task: str) -> None:
    for image in (damaged / "train" / "images").iterdir():
        image.write_bytes(b"")
    with pytest.raises(DataError, match="none of the"):
        evaluated_task(task).evaluate(ready, train(damaged))


def test_no_records_is_an_error(ready: Ready) -> None:
    with pytest.raises(DataError, match="no records"):
        Evaluation(ready, [])


@pytest.mark.parametrize(
    ("task", "fields", "lacks"),
    [
        ("caption", {"decoder_layers": 0}, "decoder"),
        ("vqa", {"decoder_layers": 0}, "decoder"),
        ("grounding", {"decoder_layers": 0}, "decoder"),
        ("statements", {}, "classifier statement"),
        ("entailment", {}, "classifier entailment"),
        ("retrieval", {"fusion": "none"}, "matching head"),
    ],
)
def test_model_without_the_part(
    scenes: Path, tokenizer: Tokenizer, task: str, fields: dict[str, Any], lacks: str
) -> None:
    small = Ready(small_model(vision=CNN, vocab_size=tokenizer.vocab_size, max_positions=64, **fields), tokenizer)
    options = {"candidates": 3} if task == "retrieval" else {}
    with pytest.raises(CheckpointError, match=f"this model has no {lacks}"):
        evaluated_task(task).evaluate(small, train(scenes), EvaluateOptions(limit=4, **options))


def test_model_without_boxes(scenes: Path) -> None:
    from mplug_core.data.text import build_vocabulary

    plain = Tokenizer(build_vocabulary(["the red circle"]))
    small = Ready(small_model(vision=CNN, vocab_size=plain.vocab_size, max_positions=64), plain)
    with pytest.raises(CheckpointError, match="no box tokens"):
        TASKS["grounding"].evaluate(small, train(scenes), EvaluateOptions(limit=4))


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no task 'captions' to evaluate, did you mean 'caption'"):
        evaluated_task("captions")


def test_texts_have_no_special_tokens(ready: Ready) -> None:
    forbidden = set(forbidden_tokens(ready.tokenizer))
    tokenizer = ready.tokenizer
    assert tokenizer.sep_id not in forbidden
    assert {tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id, tokenizer.unk_id, tokenizer.box_id(3)} <= forbidden
    answers = caption_images(ready, torch.randn(2, 3, 32, 32), Decoding(beams=3, best=3, max_tokens=6))
    assert all(len(row) == 3 for row in answers)
    for answer in (a for row in answers for a in row):
        assert "[" not in answer.text.split() and 0 <= answer.confidence <= 1
