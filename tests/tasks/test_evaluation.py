"""Evaluation: broken images are counted, never hidden; scores are those computed by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mplug_core.data.records import QuestionRecord, read_captions
from mplug_core.data.text import Tokenizer
from mplug_core.errors import CheckpointError, DataError, UsageError
from mplug_core.generation import Decoding
from mplug_core.recipe import DataSpec
from mplug_core.tasks import vqa
from mplug_core.tasks.caption import caption_images, forbidden_tokens
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.registry import EVALUATED, TASKS, evaluated_task
from mplug_core.tasks.retrieval import recall, rerank
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
    assert len(result.predictions) in (0, result.n) and result.seconds > 0
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
    forbidden = set(forbidden_tokens(ready))
    tokenizer = ready.tokenizer
    assert tokenizer.sep_id not in forbidden
    assert {tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id, tokenizer.unk_id, tokenizer.box_id(3)} <= forbidden
    answers = caption_images(ready, torch.randn(2, 3, 32, 32), Decoding(beams=3, best=3, max_tokens=6))
    assert all(len(row) == 3 for row in answers)
    for answer in (a for row in answers for a in row):
        assert "[" not in answer.text.split() and 0 <= answer.confidence <= 1


class TestVqaScore:
    """Official rule: right if at least three of ten annotators gave the answer."""

    @pytest.mark.parametrize(
        ("answers", "weights", "said", "score"),
        [
            (("red",), (1.0,), "red", 1.0),
            (("red",), (1.0,), "blue", 0.0),
            (("red", "dark red", "pink", "rose"), (0.4, 0.3, 0.2, 0.1), "red", 1.0),
            (("red", "dark red", "pink", "rose"), (0.4, 0.3, 0.2, 0.1), "dark red", 1.0),
            (("red", "dark red", "pink", "rose"), (0.4, 0.3, 0.2, 0.1), "pink", 2 / 3),
            (("red", "dark red", "pink", "rose"), (0.4, 0.3, 0.2, 0.1), "rose", 1 / 3),
            (("Red.", "red", "blue"), (0.1, 0.1, 0.8), "red", 2 / 3),
        ],
    )
    def test_by_hand(
        self, ready: Ready, scenes: Path, monkeypatch: pytest.MonkeyPatch, answers: tuple[str, ...],
        weights: tuple[float, ...], said: str, score: float,
    ) -> None:  # fmt: skip
        image = read_captions(scenes, "train").records[0].image
        records = SimpleNamespace(
            records=[QuestionRecord(image, "q", answers, weights, "color")], missing=[], broken=[]
        )
        monkeypatch.setattr(vqa, "read_questions", lambda path, split: records)
        monkeypatch.setattr(vqa, "answer_questions", lambda *args: [said])
        result = TASKS["vqa"].evaluate(ready, DataSpec(path="x"))
        assert result.metrics == {"accuracy": pytest.approx(score), "accuracy_color": pytest.approx(score)}


class TestRetrieval:
    def test_recall_by_hand(self) -> None:
        scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.6, 0.7, 0.8]])
        relevant = torch.eye(3, dtype=torch.bool)
        # the second query's own is its second best
        assert recall(scores, relevant, 1) == pytest.approx(2 / 3)
        assert recall(scores, relevant, 2) == 1.0
        assert recall(scores, relevant, 10) == 1.0

    def test_several_relevant(self) -> None:
        scores = torch.tensor([[0.1, 0.9, 0.5]])
        assert recall(scores, torch.tensor([[True, False, True]]), 1) == 0.0
        assert recall(scores, torch.tensor([[True, False, True]]), 2) == 1.0

    def test_evaluation_by_hand(self, ready: Ready, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Features planted so that text k is nearest to image k for even k, to image k - 1 for odd k."""
        records = read_captions(scenes, "train").records[:6]
        planted = iter(range(100))

        def feature(text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            owners = [i for i, record in enumerate(records) for _ in record.captions]
            return torch.stack([torch.eye(6)[owners[next(planted)] // 2 * 2] for _ in text])

        encode = ready.model.encode_image
        shown = iter(range(100))

        def encode_image(pixels: torch.Tensor) -> Any:
            found = encode(pixels)
            found.feature = torch.stack([torch.eye(6)[next(shown)] for _ in pixels])
            return found

        monkeypatch.setattr(ready.model, "text_feature", feature)
        monkeypatch.setattr(ready.model, "encode_image", encode_image)
        monkeypatch.setattr("mplug_core.tasks.retrieval.clean_caption", lambda text: text + str(id(text)))
        metrics = TASKS["retrieval"].evaluate(ready, train(scenes), EvaluateOptions(limit=6)).metrics
        assert metrics["t2i_r1"] == pytest.approx(0.5)

    def test_rerank_puts_candidates_first_in_the_order_of_their_match(self, ready: Ready) -> None:
        images = ready.model.encode_image(torch.randn(4, 3, 32, 32))
        ids, mask = ready.texts.encode(["a red circle", "two", "a large blue square and a cross"])
        text = ready.model.encode_text(ids, mask)
        encoded = [(text[i], mask[i]) for i in range(3)]
        scores = torch.rand(3, 4)
        with torch.no_grad():
            new = rerank(ready, scores, images, encoded, 2)
            back = rerank(ready, scores.T, images, encoded, 2, by_image=True)
            for query in range(3):
                for candidate in scores[query].topk(2).indices.tolist():
                    _, fused = ready.model.fuse(
                        images[torch.tensor([candidate])], text[query : query + 1], mask[query : query + 1]
                    )
                    logits = ready.model.matching_logits(fused)[0]
                    assert float(new[query, candidate]) == pytest.approx(1000 + float(logits[1] - logits[0]), abs=1e-2)
            # the same pair scores the same from both sides
            both = (new > 500) & (back.T > 500)
            assert torch.allclose(new[both], back.T[both], atol=1e-2)
        assert ((new > 500).sum(1) == 2).all() and ((back > 500).sum(1) == 2).all()
        assert torch.equal(new[new < 500], scores[new < 500])
