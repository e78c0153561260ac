"""Fine-tuning runs: start from any model, keep the best, stop when nothing improves, lose nothing on bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mplug_core.data.scenes import write_scenes
from mplug_core.errors import CheckpointError, DataError, Preempted, RecipeError
from mplug_core.model.teacher import build_teacher
from mplug_core.recipe import Recipe, check_recipe
from mplug_core.training.loop import NAMED, Progress
from mplug_core.training.trainer import Trainer, train
from mplug_core.weights.folder import load_model
from tests.training.recipes import scene_recipe
from tests.weights.test_official import released


@pytest.fixture(scope="module")
def start(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a model that has been trained a little, without classifiers and boxes."""
    folder = tmp_path_factory.mktemp("start") / "run"
    changes = ("model.classifiers={}", "model.box_bins=0", "data.sources.scenes.tasks={caption: 1}", "steps=2")
    train(scene_recipe(scenes, folder, *changes, objectives={"caption": 1}))
    return folder


def finetune_recipe(scenes: Path, start: Path, folder: Path, *overrides: str, **values: Any) -> Recipe:
    """Questions on scenes, evaluated at every second step."""
    recipe = {
        "name": "test",
        "steps": 6,
        "start": {"model": str(start)},
        "data": {
            "max_text": 40,
            "sources": {"scenes": {"path": str(scenes), "split": "train", "batch_size": 8, "augment": "none",
                                   "tasks": {"vqa": 1}}},
        },
        "objectives": {"answer": 1},
        "teacher": {"alpha": 0, "queue_size": 0},
        "optimizer": {"lr": 2e-3, "warmup_steps": 2},
        "engine": {"name": "plain", "precision": "fp32"},
        "evaluate": {"val": {"path": str(scenes), "split": "train", "tasks": ["vqa"], "limit": 4}},
        "run": {"folder": str(folder), "log_every": 1, "save_every": 100, "evaluate_every": 2},
    }  # fmt: skip
    if values.get("stages"):  # which have their own lengths
        del recipe["steps"]
    return check_recipe({**recipe, **values}, overrides)


def scripted(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Evaluations give these scores, one after the other, whatever the model."""
    upcoming = iter(scores)
    found = lambda self, state: {"val/vqa/accuracy": next(upcoming), "val/vqa/loss": 1.0}  # noqa: E731
    monkeypatch.setattr(Trainer, "evaluate", found)


def steps(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "evaluation" not in line]


BEST = "run.best=val/vqa/accuracy"


class TestStart:
    @pytest.mark.parametrize(
        ("task", "objective", "needs"),
        [
            ("caption", "caption", {}),
            ("vqa", "answer", {}),
            ("grounding", "box", {"box_bins": 8}),
            ("statements", "statement", {"classifiers": {"statement": {"images": 2, "labels": ["false", "true"]}}}),
            (
                "entailment",
                "entailment",
                {"classifiers": {"entailment": {"labels": ["entailment", "neutral", "contradiction"]}}},
            ),
        ],
    )
    def test_every_task_from_a_model_of_another(
        self, scenes: Path, start: Path, tmp_path: Path, task: str, objective: str, needs: dict[str, Any]
    ) -> None:
        changes = ("steps=2", f"data.sources.scenes.tasks={{{task}: 1}}")
        recipe = finetune_recipe(
            scenes, start, tmp_path / "run", *changes, objectives={objective: 1}, evaluate={}, model=needs
        )
        train(recipe)
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(line[objective]) for line in lines)
        found = load_model(str(tmp_path / "run"))
        assert found.config.width == 32 and found.config.box_bins == needs.get("box_bins", 0)
        if needs:
            lacking = finetune_recipe(scenes, start, tmp_path / "no", *changes, objectives={objective: 1}, evaluate={})
            with pytest.raises(RecipeError, match=f"objectives: {objective} needs model"):
                Trainer(lacking, lambda *a: None)

    def test_retrieval_with_teacher_and_queue(self, scenes: Path, start: Path, tmp_path: Path) -> None:
        changes = ("steps=3", "data.sources.scenes.tasks={retrieval: 1}", "teacher={alpha: 0.4, queue_size: 20}")
        train(finetune_recipe(scenes, start, tmp_path / "run", *changes, objectives={"itc": 1, "itm": 1}, evaluate={}))
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(line["itc"]) and math.isfinite(line["itm"]) for line in lines)

    def test_the_recipe_that_is_written_down_is_complete_and_goes_on(
        self, scenes: Path, start: Path, tmp_path: Path
    ) -> None:
        recipe = finetune_recipe(scenes, start, tmp_path / "run", "steps=2", "model.dropout=0.2")
        train(recipe)
        from mplug_core.recipe import load_recipe

        again = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
        assert again.model.width == 32 and again.model.dropout == 0.2
        kinds: list[str] = []
        train(again, watch=lambda kind, figures: kinds.append(kind))
        assert "step" not in kinds
        with pytest.raises(CheckpointError, match=r"another recipe \(model.dropout: 0.2 -> 0.3"):
            train(finetune_recipe(scenes, start, tmp_path / "run", "steps=2", "model.dropout=0.3"))

    def test_words_of_the_records_become_pieces(self, start: Path, tmp_path: Path) -> None:
        write_scenes(tmp_path / "scenes", n=6, seed=1)
        file = tmp_path / "scenes" / "train" / "questions.jsonl"
        entry = json.loads(file.read_text().splitlines()[0]) | {"question": "is it a wardrobe?", "answer": "fridge"}
        file.write_text(json.dumps(entry) + "\n")
        notes: list[str] = []
        trainer = Trainer(
            finetune_recipe(tmp_path / "scenes", start, tmp_path / "run", "data.vocabulary=extend"),
            lambda kind, figures: notes.append(figures["text"]),
        )
        old = load_model(str(start)).tokenizer
        assert {"wardrobe", "fridge"} <= set(trainer.tokenizer.pieces) - set(old.pieces)
        assert trainer.tokenizer.pieces[: old.vocab_size] == old.pieces
        assert trainer.config.vocab_size == trainer.tokenizer.vocab_size
        assert any(f"now {trainer.tokenizer.vocab_size}" in note for note in notes)

    @pytest.mark.parametrize("wrapping", ["model", "module"])
    def test_released_checkpoint(self, scenes: Path, tmp_path: Path, wrapping: str) -> None:
        """Its words are in vocab.txt beside it; what a caption checkpoint lacks is fresh."""
        from mplug_core.data.text import Tokenizer

        tensors = released()
        count = len(tensors["text_decoder.bert.embeddings.word_embeddings.weight"])
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        Tokenizer([*pieces, *(f"word{k}" for k in range(count - len(pieces)))]).save(tmp_path / "vocab.txt")
        whole = {name: value for name, value in tensors.items() if not name.startswith("itm_head")}
        torch.save({wrapping: whole}, tmp_path / "mplug.pth")
        notes: list[str] = []
        recipe = finetune_recipe(scenes, tmp_path / "mplug.pth", tmp_path / "run", "model.vision.image_size=32")
        trainer = Trainer(recipe, lambda kind, figures: notes.append(figures["text"]))
        assert trainer.config.rule == "released" and trainer.config.vision.image_size == 32
        assert torch.equal(trainer.model.text_projection.weight, tensors["text_proj.weight"])
        assert "resized to 4 x 4" in notes[0] and "from nothing: matching_head" in notes[0]
        with pytest.raises(CheckpointError, match="mplug finetune --model makes a complete model"):
            load_model(str(tmp_path / "mplug.pth"))

    def test_pickled_code_is_not_run(self, scenes: Path, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "executed"),)

        torch.save({"model": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(CheckpointError, match="cannot read"):
            Trainer(finetune_recipe(scenes, tmp_path / "evil.pth", tmp_path / "run"), lambda *a: None)
        assert not (tmp_path / "executed").exists()

    def test_start_that_is_not_there(self, scenes: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no model folder"):
            Trainer(finetune_recipe(scenes, tmp_path / "none.pth", tmp_path / "run"), lambda *a: None)


class TestTeacher:
    def test_answers_are_distilled_by_a_teacher_of_all_their_parts(
        self, scenes: Path, start: Path, tmp_path: Path
    ) -> None:
        trainer = Trainer(finetune_recipe(scenes, start, tmp_path / "a", "teacher.alpha=0.4"), lambda *a: None)
        teacher, queue = build_teacher(trainer.model, trainer.recipe.teacher, {"answer": 1.0})
        assert {"visual", "text", "fusion", "decoder"} <= set(teacher.parts) and queue is None
        assert "masked_head" not in teacher.parts and "matching_head" not in teacher.parts

    def test_no_teacher_without_alpha(self, scenes: Path, start: Path, tmp_path: Path) -> None:
        trainer = Trainer(finetune_recipe(scenes, start, tmp_path / "a"), lambda *a: None)
        assert build_teacher(trainer.model, trainer.recipe.teacher, {"answer": 1.0}) == (None, None)

    def test_it_acts(self, scenes: Path, start: Path, tmp_path: Path) -> None:
        """At the same weights and batch a soft target gives another loss than a hard one."""
        losses = []
        for alpha in (0, 0.4):
            folder = tmp_path / f"{alpha}"
            changes = ("steps=1", f"teacher.alpha={alpha}", "teacher.ramp_steps=1", "model.dropout=0")
            recipe = finetune_recipe(scenes, start, folder, *changes, evaluate={})
            # alpha rises from 0: the second step is the first with a part of it
            train(recipe.model_copy(update={"steps": 3}))
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            losses.append([line["answer"] for line in lines])
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
        assert losses[0][1] != pytest.approx(losses[1][1], rel=1e-3)


class TestBest:
    def test_best_and_last_are_kept(
        self, scenes: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scripted(monkeypatch, 0.2, 0.5, 0.3)
        events: list[tuple[str, dict[str, Any]]] = []
        run = train(
            finetune_recipe(scenes, start, tmp_path / "run", BEST), watch=lambda k, f: events.append((k, dict(f)))
        )
        best, last = (load_file(run / name / "model.safetensors") for name in ("best", "model"))
        assert any(not torch.equal(best[name], last[name]) for name in best)
        assert load_model(str(run)).folder == run / "best"
        card = (run / "best" / "README.md").read_text()
        assert "| val/vqa/accuracy | 0.5000 |" in card and "4 steps" in card and "| val/vqa/loss |" in card
        assert "| val/vqa/accuracy | 0.3000 |" in (run / "model" / "README.md").read_text()
        scores = dict(events)["scores"]
        assert (scores["last"]["val/vqa/accuracy"], scores["best"]["val/vqa/accuracy"]) == (0.3, 0.5)
        assert scores["at"] == {"last": 6, "best": 4}
        assert [kind for kind, _ in events][-2:] == ["scores", "end"]
        assert dict(events)["end"]["folder"] == str(run / "best")

    def test_without_a_metric_there_is_only_the_last(self, scenes: Path, start: Path, tmp_path: Path) -> None:
        run = train(finetune_recipe(scenes, start, tmp_path / "run", "steps=2"))
        assert not (run / "best").exists() and load_model(str(run)).folder == run / "model"

    def test_patience(self, scenes: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scripted(monkeypatch, 0.2, 0.5, 0.5, 0.4, 0.9)
        notes: list[str] = []
        recipe = finetune_recipe(scenes, start, tmp_path / "run", BEST, "run.patience=2", "steps=20")
        run = train(recipe, watch=lambda kind, f: notes.append(f["text"]) if kind == "note" else None)
        assert steps(run) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert "stage train ends at step 8: val/vqa/accuracy was best at step 4" in notes
        # a run that has stopped has ended
        kinds: list[str] = []
        train(recipe, watch=lambda kind, figures: kinds.append(kind))
        assert "step" not in kinds and steps(run) == [1, 2, 3, 4, 5, 6, 7, 8]

    def test_patience_is_of_a_stage(
        self, scenes: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scripted(monkeypatch, 0.5, 0.4, 0.3, 0.2)
        stages = [{"name": "a", "steps": 10}, {"name": "b", "steps": 4}]
        run = train(finetune_recipe(scenes, start, tmp_path / "run", BEST, "run.patience=1", stages=stages))
        assert steps(run) == [1, 2, 3, 4, 5, 6], "a: best at 2, worse at 4; b: worse at 2"

    def test_resumed_run_knows_its_best(
        self, scenes: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = finetune_recipe(scenes, start, tmp_path / "run", BEST, "run.patience=2", "steps=20")
        scripted(monkeypatch, 0.5, 0.4, 0.3)

        def stop(kind: str, figures: dict[str, Any]) -> None:
            if kind == "step" and figures["step"] == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Preempted):
            train(recipe, watch=stop)
        kept = (tmp_path / "run" / "best" / "README.md").read_text()
        scripted(monkeypatch, 0.3)
        run = train(recipe)
        assert steps(run) == [1, 2, 3, 4, 5, 6], "one evaluation without a best before, one after"
        assert (run / "best" / "README.md").read_text() == kept

    def test_an_evaluation_that_a_stop_left_out_is_made_up_for(
        self, scenes: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = finetune_recipe(scenes, start, tmp_path / "run", BEST, "run.patience=2", "steps=20", "run.log_every=1")
        scripted(monkeypatch, 0.5, 0.4, 0.3)

        def stop(kind: str, figures: dict[str, Any]) -> None:
            if kind == "step" and figures["step"] == 6:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Preempted):
            train(recipe, watch=stop)
        scripted(monkeypatch, 0.3)
        run = train(recipe)
        assert steps(run) == [1, 2, 3, 4, 5, 6], "the evaluation of step 6 is the second without a best"
        events: list[str] = []
        train(recipe, watch=lambda kind, figures: events.append(kind))
        assert "evaluation" not in events and "step" not in events

    def test_a_run_started_anew_forgets_the_old_best(
        self, scenes: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scripted(monkeypatch, 0.5)
        train(finetune_recipe(scenes, start, tmp_path / "run", BEST, "steps=2"))
        run = train(finetune_recipe(scenes, start, tmp_path / "run", "steps=2", "evaluate={}"), resume="never")
        assert not (run / "best").exists()

    def test_progress(self) -> None:
        progress = Progress()
        assert progress.note_scores({"a/b/c": 0.5}, "a/b/c") and not progress.note_scores({"a/b/c": 0.5}, "a/b/c")
        assert not progress.note_scores({"a/b/c": math.nan}, "a/b/c") and progress.stale == 2
        low = Progress()
        assert low.note_scores({"a/b/c": 0.5}, "-a/b/c") and low.note_scores({"a/b/c": 0.4}, "-a/b/c")
        assert not low.note_scores({"a/b/c": 0.6}, "-a/b/c")
        assert not Progress().note_scores({"a/b/c": 0.5}, None)
        with pytest.raises(RecipeError, match="no metric 'a/b/accurcy', did you mean 'a/b/accuracy'"):
            Progress().note_scores({"a/b/accuracy": 1.0}, "a/b/accurcy")


class TestBadInput:
    def test_no_records(self, scenes: Path, start: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text("")
        with pytest.raises(DataError, match=r"empty\.jsonl"):
            Trainer(
                finetune_recipe(scenes, start, tmp_path / "r", f"data.sources.scenes.path={tmp_path}/empty.jsonl",
                                "data.sources.scenes.split=null"),
                lambda *a: None,
            )  # fmt: skip

    def test_evaluation_without_records_is_known_before_the_first_step(
        self, scenes: Path, start: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(DataError, match="evaluate.val: "):
            Trainer(finetune_recipe(scenes, start, tmp_path / "r", "evaluate.val.split=tset"), lambda *a: None)

    @pytest.mark.parametrize(
        "objectives", [{"answer": 1}, {"itc": 1, "itm": 1}, {"caption": 1}, {"statement": 1}, {"mlm": 1}]
    )
    def test_one_example_a_batch(self, scenes: Path, start: Path, tmp_path: Path, objectives: dict[str, float]) -> None:
        task = {"answer": "vqa", "itc": "retrieval", "statement": "statements", "mlm": "pretrain"}
        task = task.get(next(iter(objectives)), "caption")
        classifiers = {"classifiers": {"statement": {"images": 2, "labels": ["false", "true"]}}}
        changes = ("data.sources.scenes.batch_size=1", f"data.sources.scenes.tasks={{{task}: 1}}", "steps=3")
        teacher = {"alpha": 0.4, "queue_size": 4}
        run = train(
            finetune_recipe(
                scenes, start, tmp_path / "run", *changes, objectives=objectives, evaluate={}, model=classifiers,
                teacher=teacher,
            )
        )  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 3 and all(math.isfinite(line["loss"]) for line in lines)
        assert all(bool(v.isfinite().all()) for v in load_file(run / "model" / "model.safetensors").values())

    @pytest.mark.parametrize("task", ["vqa", "statements"])
    def test_a_batch_of_broken_images_is_counted_and_others_take_its_place(
        self, scenes: Path, start: Path, tmp_path: Path, task: str
    ) -> None:
        shutil.copytree(scenes / "train", tmp_path / "d" / "train")
        for image in sorted((tmp_path / "d" / "train" / "images").iterdir())[:20]:
            image.write_bytes(b"no image")
        changes = ("data.sources.scenes.batch_size=1", f"data.sources.scenes.tasks={{{task}: 1}}", "steps=12")
        changes += ("data.max_bad_fraction=1",)
        notes: list[str] = []
        run = train(
            finetune_recipe(
                tmp_path / "d", start, tmp_path / "run", *changes, evaluate={},
                objectives={"answer" if task == "vqa" else "statement": 1},
                model={"classifiers": {"statement": {"images": 2, "labels": ["false", "true"]}}},
            ),
            watch=lambda kind, figures: notes.append(figures["text"]) if kind == "note" else None,
        )  # fmt: skip
        assert steps(run) == list(range(1, 13))
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["bad_images"] > 0 and math.isfinite(last["loss"])
        assert sum("skipped image" in note for note in notes) == min(last["bad_images"], NAMED)

    def test_when_nothing_can_be_read_any_more_what_was_learned_is_saved(
        self, scenes: Path, start: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(scenes / "train", tmp_path / "d" / "train")

        def damage(kind: str, figures: dict[str, Any]) -> None:
            if kind == "step" and figures["step"] == 3:
                for image in (tmp_path / "d" / "train" / "images").iterdir():
                    image.write_bytes(b"no image")

        recipe = finetune_recipe(tmp_path / "d", start, tmp_path / "run", "run.save_every=100", evaluate={})
        with pytest.raises(DataError, match="no image of a batch can be read") as caught:
            train(recipe, watch=damage)
        assert caught.value.exit_code == 3
        shutil.copytree(scenes / "train", tmp_path / "d" / "train", dirs_exist_ok=True)
        assert steps(train(recipe)) == [1, 2, 3, 4, 5, 6]
