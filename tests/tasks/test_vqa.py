"""Visual question answering: weighted answers, the teacher, sharing of memories, ranking, and the server's format."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mplug_core.data.records import QuestionRecord
from mplug_core.data.text import Tokenizer, clean_question
from mplug_core.errors import DataError
from mplug_core.generation import Decoding
from mplug_core.model.teacher import Teacher
from mplug_core.recipe import DataSpec
from mplug_core.tasks import vqa
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Texts
from mplug_core.tasks.vqa import VqaTask, answer_questions, decode_answers, rank_answers, weighted_answers
from tests.small import CNN, small_model

TASK = VqaTask()
GREEDY = Decoding(strategy="greedy", max_tokens=6)


@pytest.fixture(scope="module")
def ready(tokenizer: Tokenizer) -> Ready:
    return Ready(small_model(vision=CNN, vocab_size=tokenizer.vocab_size, max_positions=64), tokenizer)


def record(question: str, *answers: str, weights: tuple[float, ...] = (), annotators: Any = ()) -> QuestionRecord:
    return QuestionRecord(
        Path("a.jpg"), question, answers, weights or (1.0,) * len(answers), "", annotators=tuple(annotators)
    )


RECORDS = (
    record("what color is the circle", "red", "blue", weights=(0.7, 0.3)),
    record("how many circles are there", "two"),
    record("what is red", "small circle", "large green square", "cross", weights=(0.5, 0.3, 0.2)),
)
DRAWN = [((2,), RECORDS[0]), ((0,), RECORDS[1]), ((2,), RECORDS[2])]


def block_of(drawn: Iterable[Any], tokenizer: Tokenizer, most: int | None = None) -> dict[str, torch.Tensor]:
    return TASK.encode(list(drawn), random.Random(0), Texts(tokenizer, 40, most))


def pictures(ready: Ready, count: int = 3) -> Any:
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return ready.model.encode_image(pixels)


class TestEncode:
    def test_all_answers_of_each_question(self, tokenizer: Tokenizer) -> None:
        block = block_of(DRAWN, tokenizer)
        assert block["image"].tolist() == [2, 0, 2]
        assert block["question"].tolist() == [0, 0, 1, 2, 2, 2]
        assert block["weights"].tolist() == pytest.approx([0.7, 0.3, 1.0, 0.5, 0.3, 0.2])
        texts = [tokenizer.decode(row) for row in block["target_ids"]]
        assert texts == ["red", "blue", "two", "small circle", "large green square", "cross"]
        ends = block["target_mask"].sum(1) - 1
        assert (block["target_ids"].gather(1, ends[:, None]) == tokenizer.sep_id).all()
        assert (block["target_ids"][:, 0] == tokenizer.cls_id).all()
        assert block["ids"].shape == block["mask"].shape and len(block["ids"]) == 3

    def test_questions_without_answers_are_left_out(self, tokenizer: Tokenizer) -> None:
        block = block_of([((1,), record("what is it")), *DRAWN[:2]], tokenizer)
        assert block["image"].tolist() == [2, 0] and block["question"].tolist() == [0, 0, 1]

    def test_without_any_answer_the_loss_is_zero_with_a_gradient(self, ready: Ready) -> None:
        block = block_of([((1,), record("what is it"))], ready.tokenizer)
        loss = TASK.losses(ready.model, pictures(ready), block, Context(weights={"answer": 1.0}))["answer"]
        assert float(loss.detach()) == 0 and loss.requires_grad

    def test_sets_are_one_text(self) -> None:
        assert weighted_answers(replace(record("q", "table", "chair", weights=(0.5, 0.5)), together=True)) == [
            ("table, chair", 1.0)
        ]

    def test_the_most_frequent_answers(self, tokenizer: Tokenizer) -> None:
        votes = record("q", "a", "b", "c", "d", weights=(0.1, 0.4, 0.3, 0.2), annotators=("b",) * 10)
        assert weighted_answers(votes) == [("a", 0.1), ("b", 0.4), ("c", 0.3), ("d", 0.2)]
        assert [a for a, _ in weighted_answers(votes, 2)] == ["b", "c"]
        assert [w for _, w in weighted_answers(votes, 2)] == pytest.approx([4 / 7, 3 / 7])
        tied = record("q", "a", "b", "c", weights=(0.4, 0.2, 0.4), annotators=("a",) * 10)
        assert weighted_answers(tied, 1) == [("a", 1.0)]
        assert block_of(DRAWN, tokenizer, 1)["weights"].tolist() == [1.0, 1.0, 1.0]


class TestLoss:
    def test_by_hand(self, ready: Ready) -> None:
        """Sum of w * -log p(answer) over the questions, each answer by itself with its own copy of the memory."""
        model, images = ready.model, pictures(ready)
        total = 0.0
        with torch.no_grad():
            for (row,), item in DRAWN:
                ids, mask = Texts(ready.tokenizer, 40).encode([item.question])
                memory, memory_mask = model.memory(images[torch.tensor([row])], model.encode_text(ids, mask), mask)
                for answer, weight in zip(item.answers, item.weights, strict=True):
                    target = torch.tensor([ready.tokenizer.encode(answer)])
                    logp = model.decode(target, memory, memory_mask).log_softmax(-1)
                    total -= weight * float(logp[0, :-1].gather(1, target[0, 1:, None]).sum())
            block = block_of(DRAWN, ready.tokenizer)
            loss = TASK.losses(model, images, block, Context(weights={"answer": 1.0}))["answer"]
        assert float(loss) == pytest.approx(total / 3, rel=1e-5)

    def test_answers_share_the_keys_and_values_of_their_question(
        self, ready: Ready, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cross = ready.model.decoder.layers[0].cross
        project, seen = cross.keys_values, []
        monkeypatch.setattr(cross, "keys_values", lambda memory: seen.append(len(memory)) or project(memory))
        block = block_of(DRAWN, ready.tokenizer)
        TASK.losses(ready.model, pictures(ready), block, Context(weights={"answer": 1.0}))
        assert seen == [3]

    def test_slots_give_what_repeated_memories_give(self, ready: Ready) -> None:
        memory = torch.randn(3, 5, 32)
        mask = torch.ones(3, 5)
        mask[1, 2:] = 0
        ids, question = torch.randint(5, 40, (6, 4)), torch.tensor([0, 0, 0, 1, 2, 2])
        with torch.no_grad():
            got = ready.model.decoder.logits(decode_answers(ready.model, memory, mask, ids, question))
            want = ready.model.decode(ids, memory[question], mask[question])
        assert torch.allclose(got, want, atol=1e-4)

    @torch.no_grad()
    def test_label_smoothing(self, ready: Ready) -> None:
        block, images = block_of(DRAWN, ready.tokenizer), pictures(ready)
        contexts = [Context(weights={"answer": 1.0}, label_smoothing=share) for share in (0.0, 0.2)]
        plain, smooth = (float(TASK.losses(ready.model, images, block, context)["answer"]) for context in contexts)
        assert plain != pytest.approx(smooth, abs=1e-3)


class TestTeacher:
    @pytest.fixture
    def teacher(self, ready: Ready) -> Teacher:
        teacher = Teacher(ready.model)
        with torch.no_grad():
            for parameter in teacher.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return teacher

    def loss(self, ready: Ready, teacher: Teacher, alpha: float) -> torch.Tensor:
        pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        context = Context(
            weights={"answer": 1.0}, teacher=teacher, alpha=alpha,
            teacher_images=lambda: teacher.model.encode_image(pixels),
        )  # fmt: skip
        block = block_of(DRAWN, ready.tokenizer)
        return TASK.losses(ready.model, ready.model.encode_image(pixels), block, context)["answer"]

    def test_soft_targets_over_the_vocabulary_by_hand(self, ready: Ready, teacher: Teacher) -> None:
        with torch.no_grad():
            got = float(self.loss(ready, teacher, 0.4))
            block = block_of(DRAWN, ready.tokenizer)
            logits = []
            for model in (ready.model, teacher.model):
                images = model.encode_image(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
                text = model.encode_text(block["ids"], block["mask"])
                memory, mask = model.memory(images[block["image"]], text, block["mask"])
                question = block["question"]
                logits.append(model.decode(block["target_ids"], memory[question], mask[question])[:, :-1])
            labels = F.one_hot(block["target_ids"][:, 1:], logits[0].shape[-1])
            target = 0.4 * logits[1].softmax(-1) + 0.6 * labels
            tokens = -(target * logits[0].log_softmax(-1)).sum(-1) * block["target_mask"][:, 1:]
            want = float((tokens.sum(1) * block["weights"]).sum()) / 3
        assert got == pytest.approx(want, rel=1e-5)

    def test_no_gradient_reaches_the_teacher(self, ready: Ready, teacher: Teacher) -> None:
        self.loss(ready, teacher, 0.4).backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert any(parameter.grad is not None for parameter in ready.model.decoder.parameters())
        ready.model.zero_grad()

    def test_without_alpha_the_teacher_is_not_run(
        self, ready: Ready, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(teacher.model, "encode_text", lambda *_: pytest.fail("the teacher was run"))
        assert math.isfinite(float(self.loss(ready, teacher, 0.0).detach()))
        with pytest.raises(pytest.fail.Exception):
            self.loss(ready, teacher, 0.1)


class TestAnswers:
    QUESTIONS = ("what color is the circle", "how many circles are there", "Is there a red cross?", "what is red")
    ROWS = (2, 0, 0, 1)

    def test_best_answers_of_each_question(self, ready: Ready) -> None:
        found = answer_questions(ready, pictures(ready), self.ROWS, self.QUESTIONS, Decoding(beams=3, best=2))
        assert [len(row) for row in found] == [2, 2, 2, 2]
        assert all(row[0].score >= row[1].score and 0 <= row[0].confidence <= 1 for row in found)

    def test_parts_and_rows_change_nothing(self, ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
        images = pictures(ready)
        together = answer_questions(ready, images, self.ROWS, self.QUESTIONS, GREEDY)
        monkeypatch.setattr(vqa, "QUESTIONS_AT_ONCE", 3)
        parts = answer_questions(ready, images, self.ROWS, self.QUESTIONS, GREEDY)
        alone = [
            answer_questions(ready, images[torch.tensor([row])], [0], [question], GREEDY)[0]
            for row, question in zip(self.ROWS, self.QUESTIONS, strict=True)
        ]
        for other in (parts, alone):
            assert [row[0].text for row in other] == [row[0].text for row in together]
            assert [row[0].score for row in other] == pytest.approx([row[0].score for row in together], abs=1e-4)

    @pytest.mark.parametrize("fusion", ["skip", "asymmetric", "connected", "co"])
    def test_questions_on_one_image_share_it(
        self, fusion: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Images with three, one and two questions, mixed: each image goes into the fusion once."""
        model = small_model(
            vision=CNN, vocab_size=tokenizer.vocab_size, max_positions=64, fusion=fusion, stride=2, fusion_layers=3
        )
        ready, fuse, fused = Ready(model, tokenizer), model.fuse, []
        rows = (2, 0, 2, 1, 0, 2)
        questions = (*self.QUESTIONS, "what color is it", "how many small red circles are on the left of the cross")
        images = pictures(ready)
        monkeypatch.setattr(model, "fuse", lambda i, t, m: fused.append((len(i), len(t))) or fuse(i, t, m))
        together = answer_questions(ready, images, rows, questions, GREEDY)
        assert sorted(fused) == [(1, 1), (1, 2), (1, 3)]
        alone = [
            answer_questions(ready, images, [row], [question], GREEDY)[0]
            for row, question in zip(rows, questions, strict=True)
        ]
        assert [row[0].text for row in together] == [row[0].text for row in alone]
        assert [row[0].score for row in together] == pytest.approx([row[0].score for row in alone], abs=1e-4)

    def test_no_questions(self, ready: Ready) -> None:
        assert answer_questions(ready, pictures(ready), [], [], GREEDY) == []

    def test_ranking_is_the_likelihood_of_each_answer(self, ready: Ready) -> None:
        images, listed = pictures(ready), ["red", "two", "large green square", "small circle", "Red"]
        found = rank_answers(ready, images, self.ROWS, self.QUESTIONS, listed)
        ids, mask = ready.texts.encode(listed)
        for row, question, ranked in zip(self.ROWS, map(clean_question, self.QUESTIONS), found, strict=True):
            asked, asked_mask = ready.texts.encode([question])
            with torch.no_grad():
                memory = ready.model.memory(
                    images[torch.tensor([row])], ready.model.encode_text(asked, asked_mask), asked_mask
                )
                hidden = decode_answers(ready.model, *memory, ids, torch.zeros(5, dtype=torch.int64))
                logits = ready.model.decoder.logits(hidden)
            logp = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
            want = (logp * mask[:, 1:]).sum(1)
            order = want.argsort(descending=True, stable=True).tolist()
            assert [answer.score for answer in ranked] == pytest.approx(want[order].tolist(), abs=1e-4)
            assert {answer.text for answer in ranked} == set(listed)
            shares = want.softmax(0)[order].tolist()
            assert [answer.confidence for answer in ranked] == pytest.approx(shares, abs=1e-4)
        assert all(sum(answer.confidence for answer in row) == pytest.approx(1.0, abs=1e-4) for row in found)

    def test_a_long_list_is_cut_by_the_first_token(self, ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vqa, "RANKED_FURTHER", 2)
        found = rank_answers(ready, pictures(ready), self.ROWS, self.QUESTIONS, ["red", "two", "cross", "red"])
        assert [len(row) for row in found] == [2, 2, 2, 2]

    def test_an_empty_list(self, ready: Ready) -> None:
        with pytest.raises(DataError, match="no answers to choose from"):
            rank_answers(ready, pictures(ready), self.ROWS, self.QUESTIONS, [])


class TestEvaluate:
    @pytest.fixture
    def folder(self, scenes: Path, tmp_path: Path) -> Path:
        """Three questions on two images: one with the answers of ten annotators, one with a set, one hidden."""
        images = sorted((scenes / "train" / "images").iterdir())[:2]
        for image in images:
            shutil.copy(image, tmp_path)
        first, second = (image.name for image in images)
        votes = ["red"] * 2 + ["the red"] + ["blue"] * 7
        entries = [
            {"image": first, "question": "q1", "annotators": votes, "kind": "yes/no", "question_id": 11},
            {"image": first, "question": "q2", "answer": ["table", "chair"], "together": True, "question_id": 12},
            {"image": second, "question": "q3", "answer": None, "question_id": 13},
        ]
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return path

    def test_scores_and_predictions(self, ready: Ready, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said = {"q1": "red", "q2": "chair, table", "q3": "cross"}

        def answer(ready: Any, images: Any, rows: Any, questions: Any, *_: Any) -> list[list[vqa.Answer]]:
            return [[vqa.Answer(said[question], 0.0, 1.0, log_probability=0.0)] for question in questions]

        monkeypatch.setattr(vqa, "answer_questions", answer)
        result = TASK.evaluate(ready, DataSpec(path=str(folder)))
        # three of ten agree once normalised: each of them sees two others
        assert result.metrics["accuracy_yes_no"] == pytest.approx((3 * 2 / 3 + 7) / 10)
        assert result.metrics["accuracy"] == pytest.approx((0.9 + 1) / 2)
        assert result.metrics["accuracy_any"] == pytest.approx((0.9 + 1) / 2)
        assert result.n == 3
        assert [p["answer"] for p in result.predictions] == ["red", "chair, table", "cross"]
        assert {"question_id", "image", "question", "answer", "confidence"} <= set(result.predictions[0])
        assert [p.get("right") for p in result.predictions] == [pytest.approx(0.9), 1.0, None]
        assert result.metrics["ece"] == pytest.approx((1 - 0.9 + 1 - 1) / 2)
        assert [p.get("truth") for p in result.predictions] == [["blue", "red", "the red"], ["table", "chair"], None]
        assert (result.predictions[0]["kind"], result.predictions[1]["together"]) == ("yes/no", True)
        assert TASK.submission(result.predictions) == [
            {"question_id": 11, "answer": "red"},
            {"question_id": 12, "answer": "chair, table"},
            {"question_id": 13, "answer": "cross"},
        ]

    def test_answers_of_a_list(self, ready: Ready, folder: Path) -> None:
        options = EvaluateOptions(answers=("red", "two"))
        result = TASK.evaluate(ready, DataSpec(path=str(folder)), options)
        assert {p["answer"] for p in result.predictions} <= {"red", "two"}

    def test_the_server_needs_numbers(self) -> None:
        entries = [{"question_id": "", "image": "a.jpg", "question": "what?", "answer": "red"}]
        with pytest.raises(DataError, match="1 of 1 questions have no number as id, first: 'what\\?'"):
            TASK.submission(entries)
