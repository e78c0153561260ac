"""Statements on one image or two, entailment, and the evaluation that looks which of them the data are."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mplug_core.data.records import StatementRecord, read_entailments
from mplug_core.data.text import Tokenizer
from mplug_core.errors import CheckpointError, DataError
from mplug_core.metrics.reasoning import submission
from mplug_core.model.mplug import MplugModel
from mplug_core.recipe import DataSpec
from mplug_core.tasks.reasoning import LABELS, EntailmentTask, ReasoningTask, StatementTask, clean, judge, sides
from mplug_core.tasks.registry import evaluated_task
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Texts
from tests.conftest import SHARED
from tests.small import CLASSIFIERS, CNN, small_model


@pytest.fixture(scope="module")
def ready(tokenizer: Tokenizer) -> Ready:
    model = small_model(vision=CNN, vocab_size=tokenizer.vocab_size, classifiers=CLASSIFIERS, max_positions=64)
    return Ready(model, tokenizer)


@pytest.fixture
def write(tmp_path: Path, scenes: Path) -> Callable[..., DataSpec]:
    """``write("statements", {...}, ...)``: a file of these records, with the pictures of the scenes beside it."""

    def make(name: str, *records: dict[str, Any]) -> DataSpec:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return DataSpec(path=str(file), images=str(scenes / "train" / "images"))

    return make


def record(label: bool | None, *images: str, group: str = "", identifier: str = "") -> dict[str, Any]:
    shown = {"images": list(images)} if len(images) == 2 else {"image": images[0]}
    return {**shown, "statement": "there is a circle", "label": label, "group": group, "identifier": identifier}


A, B, C = "000000.jpg", "000001.jpg", "000002.jpg"


def always(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    def judged(ready: Ready, classifier: str, images: Any, rows: Any, texts: Any) -> torch.Tensor:
        probabilities = torch.zeros(len(texts), len(LABELS[classifier]))
        probabilities[:, LABELS[classifier].index(label)] = 1
        return probabilities

    monkeypatch.setattr("mplug_core.tasks.reasoning.judge", judged)


@torch.inference_mode()
def test_judging_is_the_classifier_on_the_joined_first_tokens(ready: Ready) -> None:
    """Computed step by step, an example at a time; in a batch longer texts pad the shorter ones."""
    images = ready.model.encode_image(torch.randn(3, 3, 32, 32))
    texts = ["there is a circle", "the left image has more red squares than the right image"]
    for classifier, rows in (("statement", [(2, 0), (1,)]), ("entailment", [(2,), (0,)])):
        found = judge(ready, classifier, images, rows, texts)
        assert found.shape == (2, len(LABELS[classifier]))
        for text, row, probabilities in zip(texts, rows, found, strict=True):
            ids, mask = ready.texts.encode([text])
            encoded = ready.model.encode_text(ids, mask)
            pair = row * 2 if classifier == "statement" and len(row) == 1 else row
            first = [ready.model.fuse(images[torch.tensor([r])], encoded, mask)[1][:, 0] for r in pair]
            head = ready.model.classifiers[classifier]
            assert torch.allclose(head(torch.cat(first, -1)).softmax(-1)[0], probabilities, atol=1e-5)


def test_an_image_on_both_sides_is_fused_once(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    fuse = MplugModel.fuse
    monkeypatch.setattr(MplugModel, "fuse", lambda self, *args: counts.append(len(args[1])) or fuse(self, *args))
    with torch.inference_mode():
        images = ready.model.encode_image(torch.randn(3, 3, 32, 32))
    mixed = judge(ready, "statement", images, [(0,), (0, 1), (2, 2), (1,)], ["a circle"] * 4)
    assert counts == [5]
    apart = [judge(ready, "statement", images, [rows], ["a circle"]) for rows in ((0, 0), (0, 1), (2,), (1, 1))]
    assert torch.allclose(mixed, torch.cat(apart), atol=1e-5)


def test_sides() -> None:
    assert sides([(3,), (1, 2)], 2).tolist() == [[3, 3], [1, 2]]
    assert sides([(3,), (1,)], 1).tolist() == [3, 1]


def test_a_statement_is_not_cut_at_a_caption_s_length() -> None:
    words = ["Not", "that", *["very"] * 40, "good."]
    assert clean(" ".join(words)) == " ".join(words).lower().rstrip(".")
    assert clean("  Left-hand:  2 DOGS!\n") == "left hand 2 dogs"


def test_one_and_two_images_are_learned_in_one_batch(ready: Ready, tokenizer: Tokenizer) -> None:
    drawn = [
        ((0, 1), StatementRecord((Path("a"), Path("b")), "there is a circle", True)),
        ((2,), StatementRecord((Path("c"),), "there is a square", False)),
    ]
    block = StatementTask.encode(drawn, random.Random(0), Texts(tokenizer, 30))
    assert block["image"].tolist() == [[0, 1], [2, 2]] and block["labels"].tolist() == [1, 0]
    images = ready.model.encode_image(torch.randn(3, 3, 32, 32))
    loss = StatementTask.losses(ready.model, images, block, Context(weights={"statement": 1.0}))["statement"]
    probabilities = judge(ready, "statement", images, [(0, 1), (2,)], ["there is a circle", "there is a square"])
    expected = -(probabilities[0, 1].log() + probabilities[1, 0].log()) / 2
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("task", [StatementTask, EntailmentTask])
def test_hidden_labels_can_not_be_learned(tokenizer: Tokenizer, task: Any) -> None:
    class Hidden:
        statement = hypothesis = "there is a circle"
        label = None

    with pytest.raises(DataError, match="without labels can't be learned from: 'there is a circle'"):
        task.encode([((0,), Hidden())], random.Random(0), Texts(tokenizer, 30))


def test_statements(ready: Ready, write: Callable[..., DataSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, "true")
    spec = write(
        "statements", record(True, A, B, group="x", identifier="x-0"), record(True, B, C, group="x", identifier="x-1"),
        record(True, A, group="y", identifier="y-0"), record(False, B, group="y", identifier="y-1"),
        record(None, C, group="z", identifier="z-0"),
    )  # fmt: skip
    result = StatementTask.evaluate(ready, spec, EvaluateOptions(batch_size=2))
    assert (result.n, result.metrics) == (5, {"accuracy": 0.75, "consistency": 0.5, "ece": 0.25})
    assert list(submission(result.predictions)) == [f"{name},True" for name in ("x-0", "x-1", "y-0", "y-1", "z-0")]
    first, third = result.predictions[0], result.predictions[2]
    assert [Path(path).name for path in first["images"]] == [A, B] and Path(third["image"]).name == A
    assert (first["statement"], first["label"], first["probability"]) == ("there is a circle", "true", 1.0)


def test_a_hidden_test_is_answered_and_not_scored(ready: Ready, write: Callable[..., DataSpec]) -> None:
    result = StatementTask.evaluate(ready, write("statements", record(None, A), record(None, B, C)))
    assert (result.n, result.metrics, len(result.predictions)) == (2, {}, 2)
    assert all(p["label"] in ("true", "false") and 0.5 <= p["probability"] <= 1 for p in result.predictions)


def test_the_hidden_split_of_nlvr_is_answered_and_not_scored(ready: Ready, scenes: Path, tmp_path: Path) -> None:
    for number in range(6):
        place = tmp_path / f"hidden/images/{number % 2}/hidden-15-0-{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / "train" / "images" / A, place.with_suffix(".png"))
    (tmp_path / "hidden/hidden.json").write_text(json.dumps({"sentence": "there is a circle", "identifier": "15-0"}))
    result = StatementTask.evaluate(ready, DataSpec(path=str(tmp_path), split="hidden"))
    assert (result.n, result.metrics) == (6, {})
    assert [line.split(",")[0] for line in submission(result.predictions)] == [f"hidden-15-0-{k}" for k in range(6)]


def test_entailment(ready: Ready, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, "neutral")
    spec = DataSpec(path=str(scenes), split="train")
    result = EntailmentTask.evaluate(ready, spec)
    labels = [record.label for record in read_entailments(scenes, "train")]
    assert result.metrics == {
        "accuracy": pytest.approx(labels.count("neutral") / len(labels)), "accuracy_entailment": 0.0,
        "accuracy_neutral": 1.0, "accuracy_contradiction": 0.0,
        "ece": pytest.approx(1 - labels.count("neutral") / len(labels)),
    }  # fmt: skip


class TestReasoning:
    def test_is_evaluated_by_name(self) -> None:
        assert isinstance(evaluated_task("reasoning"), ReasoningTask)

    def test_statements(self, ready: Ready, write: Callable[..., DataSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        always(monkeypatch, "false")
        result = evaluated_task("reasoning").evaluate(ready, write("x", record(True, A, B), record(False, C)))
        assert (result.task, result.n, result.metrics) == ("reasoning", 2, {"accuracy": 0.5, "ece": 0.5})

    def test_entailment(self, ready: Ready, write: Callable[..., DataSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        always(monkeypatch, "entailment")
        spec = write("x", {"image": A, "hypothesis": "a circle", "label": "entailment"})
        result = evaluated_task("reasoning").evaluate(ready, spec)
        assert result.metrics == {"accuracy": 1.0, "accuracy_entailment": 1.0, "ece": 0.0}
        assert result.predictions[0]["hypothesis"] == "a circle"

    def test_a_folder_with_both(self, ready: Ready, scenes: Path) -> None:
        spec = DataSpec(path=str(scenes), split="train")
        result = evaluated_task("reasoning").evaluate(ready, spec, EvaluateOptions(limit=6))
        alone = [task.evaluate(ready, spec, EvaluateOptions(limit=6)) for task in (StatementTask, EntailmentTask)]
        assert result.n == 12 and result.predictions == [p for r in alone for p in r.predictions]
        assert result.metrics == {f"{r.task}_{name}": value for r in alone for name, value in r.metrics.items()}
        assert {"statements_accuracy", "entailment_accuracy"} <= set(result.metrics)

    def test_neither(self, ready: Ready, write: Callable[..., DataSpec]) -> None:
        with pytest.raises(DataError, match="neither statements nor entailment"):
            evaluated_task("reasoning").evaluate(ready, write("x", {"image": A, "caption": "a circle"}))

    def test_nothing_there(self, ready: Ready, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"^there is no data at \S+none \(check the path\)$"):
            evaluated_task("reasoning").evaluate(ready, DataSpec(path=str(tmp_path / "none")))

    def test_a_model_without_the_head(self, tokenizer: Tokenizer, write: Callable[..., DataSpec]) -> None:
        bare = Ready(small_model(vision=CNN, vocab_size=tokenizer.vocab_size), tokenizer)
        with pytest.raises(CheckpointError, match="no classifier statement"):
            evaluated_task("reasoning").evaluate(bare, write("x", record(True, A)))


@pytest.mark.parametrize(
    ("path", "split", "images", "count"),
    [("nlvr", "dev", None, 1), ("samples/nlvr2", None, "samples/images/nlvr2", 2)],
    ids=["nlvr", "nlvr2"],
)
def test_official_layouts(ready: Ready, path: str, split: str | None, images: str | None, count: int) -> None:
    data = SHARED / "data"
    if not (data / path).is_dir():
        pytest.skip(f"no {data / path}")
    spec = DataSpec(path=str(data / path), split=split, images=images and str(data / images))
    result = evaluated_task("reasoning").evaluate(ready, spec, EvaluateOptions(limit=24))
    assert 0 < result.n <= 24 and {"accuracy", "consistency", "ece"} == set(result.metrics)
    assert all(len(p.get("images", ["one"])) == count and p["identifier"] for p in result.predictions)
