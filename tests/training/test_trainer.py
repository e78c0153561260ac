"""Runs: resumed is uninterrupted, told to stop is saved, another recipe is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mplug_core.errors import CheckpointError, DataError, MplugError, Preempted, RecipeError
from mplug_core.model.teacher import build_teacher
from mplug_core.recipe import Recipe
from mplug_core.training.checkpoint import latest_checkpoint
from mplug_core.training.resume import forget_later_metrics, refuse_other_recipe
from mplug_core.training.trainer import Trainer, train
from mplug_core.weights.folder import load_model
from tests.training.photos import photo_recipe, write_photos
from tests.training.processes import ROOT, without_launcher
from tests.training.recipes import scene_recipe
from tests.weights.test_bert import make_bert, save_bert

TIMES = (
    "images_per_second", "tokens_per_second", "mfu", "memory_gb", "seconds", "eta_seconds", "evaluation_seconds",
)  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class StopAt:
    """A watcher that asks the run to stop, as a cluster does, when it has logged a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def __call__(self, kind: str, figures: dict[str, Any]) -> None:
        if kind == "step" and figures["step"] == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures with captions, questions and statements, and captions alone."""
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


STAGES = [{"name": "see", "steps": 4, "objectives": {"patches": 1}}, {"name": "learn", "steps": 5}]


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two stages with dropout, teacher, queue, average and accumulation."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(two_stages(scenes, folder))
    return folder


def two_stages(scenes: Path, folder: Path, *overrides: str) -> Recipe:
    evaluate = {"val": {"path": str(scenes), "split": "train", "tasks": ["vqa"], "limit": 10}}
    return scene_recipe(
        scenes, folder, "run.average=0.9", "engine.accumulate=2", *overrides, stages=STAGES, evaluate=evaluate
    )


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    lines = metrics(whole)
    steps = [line for line in lines if "evaluation" not in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["stage"] for line in steps] == ["see"] * 4 + ["learn"] * 5
    assert {"loss", "patches", "grad_norm", "lr"} <= steps[0].keys()
    objectives = {"itc", "itm", "mlm", "prefix_lm", "caption", "answer", "box", "statement", "entailment", "patches"}
    assert objectives <= steps[-1].keys()
    evaluations = [line for line in lines if "evaluation" in line]
    # stage `see` trains nothing that answers
    assert [line["step"] for line in evaluations] == [9] and "val/vqa/accuracy" in evaluations[0]["evaluation"]
    assert latest_checkpoint(whole).name == "step-00000009"
    loaded = load_model(str(whole))
    assert loaded.tokenizer.bins == 8 and loaded.config.width == 32
    assert not any("task_heads" in name for name in weights(whole))


@pytest.mark.parametrize("stop", [2, 4, 6, 8])
def test_resumed_equals_uninterrupted(scenes: Path, whole: Path, tmp_path: Path, stop: int) -> None:
    recipe = two_stages(scenes, tmp_path / "run")
    # at the end of a stage the signal is noticed in the next one
    with pytest.raises(Preempted, match="saved in") as caught:
        train(recipe, watch=StopAt(stop))
    assert caught.value.exit_code == 75
    notes: list[str] = []
    train(recipe, watch=lambda kind, figures: notes.append(figures["text"]) if kind == "note" else None)
    assert any("resumed" in note for note in notes)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert equal(weights(tmp_path / "run"), weights(whole))


def test_killed_run_repeats_no_line(scenes: Path, whole: Path, tmp_path: Path) -> None:
    """After a kill the log is ahead of the last checkpoint: what is computed again is not written twice."""

    class Killed(Exception):
        pass

    def kill(kind: str, figures: dict[str, Any]) -> None:
        if kind == "step" and figures["step"] == 8:
            raise Killed

    recipe = two_stages(scenes, tmp_path / "run")
    with pytest.raises(Killed):
        train(recipe, watch=kill)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"stage": "lea')
    train(recipe)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert equal(weights(tmp_path / "run"), weights(whole))


def test_finished_run_does_nothing(scenes: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    kinds: list[str] = []
    train(two_stages(scenes, tmp_path / "run"), watch=lambda kind, figures: kinds.append(kind))
    assert "step" not in kinds and equal(weights(tmp_path / "run"), weights(whole))


def test_never_starts_anew(scenes: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    recipe = scene_recipe(scenes, tmp_path / "run", "seed=5", "steps=3", "data.vocabulary_min_count=3")
    with pytest.raises(CheckpointError, match="another recipe"):
        train(recipe)
    train(recipe, resume="never")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    assert latest_checkpoint(tmp_path / "run").name == "step-00000003"
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["seed"] == 5
    # the old run's vocabulary is not this recipe's
    assert load_model(str(tmp_path / "run")).config.vocab_size < load_model(str(whole)).config.vocab_size


def test_refusal_names_the_differences() -> None:
    old = {"seed": 0, "optimizer": {"lr": 0.1, "eps": 1e-8}, "run": {"log_every": 1}, "stages": [{"name": "a"}]}
    refuse_other_recipe(old, {**old, "run": {"log_every": 9}, "data": {"root": "elsewhere", "workers": 2}}, Path("r"))
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: 0\.1 -> 0\.2.*") as caught:
        refuse_other_recipe(old, {**old, "optimizer": {"lr": 0.2, "eps": 1e-8}, "seed": 1}, Path("r"))
    assert "seed: 0 -> 1" in caught.value.message and caught.value.exit_code == 5


def test_log_is_cut_at_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    forget_later_metrics(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    forget_later_metrics(tmp_path / "none", 2)


def test_second_signal_stops_at_once(scenes: Path, tmp_path: Path) -> None:
    def impatient(kind: str, figures: dict[str, Any]) -> None:
        if kind == "step":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(scene_recipe(scenes, tmp_path / "run"), watch=impatient)
    assert signal.getsignal(signal.SIGINT) == before, "handlers are put back"


def test_signals_at_once_are_one_wish(scenes: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches a launcher and its processes, and the launcher hands it on."""

    def twice(kind: str, figures: dict[str, Any]) -> None:
        if kind == "step":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="stopped at step 1"):
        train(scene_recipe(scenes, tmp_path / "run"), watch=twice)


def test_loss_that_is_not_finite_ends_the_run(scenes: Path, tmp_path: Path) -> None:
    recipe = scene_recipe(
        scenes, tmp_path / "run", "optimizer.lr=1e30", "optimizer.warmup_steps=0", "run.max_skipped=3"
    )
    with pytest.raises(MplugError, match="loss is not finite: 3 steps in a row"):
        train(recipe)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_stay_as_they_are(scenes: Path, tmp_path: Path, precision: str) -> None:
    recipe = scene_recipe(
        scenes, tmp_path / "run", "freeze=[visual, text, temperature]", f"engine.precision={precision}"
    )
    start = {name: value.clone() for name, value in Trainer(recipe, lambda *a: None).model.state_dict().items()}
    train(recipe)
    for name, value in weights(tmp_path / "run").items():
        frozen = name.startswith(("visual.", "text.", "temperature"))
        moved = not torch.equal(value.float(), start[name].bfloat16().float())
        if frozen:
            assert not moved, name
    assert any(
        not torch.equal(value.float(), start[name].bfloat16().float())
        for name, value in weights(tmp_path / "run").items()
        if name.startswith("fusion.")
    )


def test_freezing_an_unknown_part_names_the_nearest(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no part 'visul', did you mean 'visual'"):
        train(scene_recipe(scenes, tmp_path / "run", "freeze=[visul]"))


def test_stage_that_nothing_feeds(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no source gives any of answer"):
        train(
            scene_recipe(scenes, tmp_path / "run", "objectives={answer: 1}", "data.sources.scenes.tasks={caption: 1}")
        )


def test_faults_of_stages_come_before_any_features(scenes: Path, tmp_path: Path) -> None:
    stages = "stages=[{name: a, steps: 1, freeze: [visul, txt]}, {name: b, steps: 1, objectives: {answer: 1}}]"
    tasks = "data.sources.scenes.tasks={caption: 1}"
    recipe = scene_recipe(scenes, tmp_path / "run", "steps=null", stages, tasks, "data.sources.scenes.cached_views=1")
    with pytest.raises(RecipeError) as caught:
        train(recipe)
    for said in ("a: freeze: no part 'visul'", "a: freeze: no part 'txt'", "b: no source gives any of answer"):
        assert said in caught.value.message
    assert not (tmp_path / "run" / "features").exists()


def test_photos_that_align_finds_no_caption_of(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "some")
    lines = (photos / "captions_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "some" / "captions_train.jsonl").write_text("".join(lines[:13]), encoding="utf-8")
    tasks = "data.sources.photos.tasks={caption: 1, vqa: 1}"
    with pytest.raises(DataError, match="stage align: 7 of 20 photos of photos have no caption"):
        train(photo_recipe(tmp_path / "some", tmp_path / "run", tasks))
    assert not (tmp_path / "run" / "features").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_aligning_acts_at_once(photos: Path, tmp_path: Path, number: int) -> None:
    """Nothing but features is there to be kept; the run goes on from them."""
    recipe, seen = photo_recipe(photos, tmp_path / "run"), []

    def stop(kind: str, figures: dict[str, Any]) -> None:
        seen.append(kind)
        if kind == "note" and figures["text"].startswith("align: "):
            os.kill(os.getpid(), number)

    with pytest.raises(Preempted, match="while aligning") as caught:
        train(recipe, watch=stop)
    assert caught.value.exit_code == 75 and "step" not in seen and "end" not in seen
    assert not (tmp_path / "run" / "align.safetensors").exists()
    train(recipe, watch=lambda kind, figures: seen.append(kind))
    assert seen[-1] == "end"


def test_a_run_that_aligns(photos: Path, tmp_path: Path) -> None:
    """Photos, and captions alone with stand-ins, in one run that is resumed."""
    recipe = photo_recipe(photos, tmp_path / "run")
    train(recipe)
    assert Trainer(recipe, lambda *a: None).run() == tmp_path / "run"
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3]
    assert all({"caption", "answer", "statement"} <= line.keys() for line in logged if "loss" in line)


def test_teacher_only_where_it_is_needed(scenes: Path, tmp_path: Path) -> None:
    trainer = Trainer(scene_recipe(scenes, tmp_path / "a"), lambda *a: None)
    teacher, queue = build_teacher(trainer.model, trainer.recipe.teacher, {"itc": 1.0, "mlm": 1.0})
    assert {"fusion", "masked_head", "text"} <= set(teacher.parts) and "decoder" not in teacher.parts
    assert queue.size == 24
    teacher, queue = build_teacher(trainer.model, trainer.recipe.teacher, {"itc": 1.0})
    assert "fusion" not in teacher.parts
    assert build_teacher(trainer.model, trainer.recipe.teacher, {"caption": 1.0}) == (None, None)
    off = Trainer(scene_recipe(scenes, tmp_path / "b", "teacher={alpha: 0, queue_size: 0}"), lambda *a: None)
    assert build_teacher(off.model, off.recipe.teacher, {"itc": 1.0, "mlm": 1.0}) == (None, None)


def test_broken_images_are_counted_in_the_log(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes / "train", tmp_path / "d" / "train")
    for image in sorted((tmp_path / "d" / "train" / "images").iterdir())[:4]:
        image.write_bytes(image.read_bytes()[:50])
    notes: list[str] = []
    recipe = scene_recipe(tmp_path / "d", tmp_path / "run", "steps=5")
    train(recipe, watch=lambda kind, figures: notes.append(figures["text"]) if kind == "note" else None)
    assert metrics(tmp_path / "run")[-1]["bad_images"] == 4
    assert sum("skipped image" in note for note in notes) == 4


def test_too_many_missing_images_are_refused(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes / "train", tmp_path / "d" / "train")
    for image in sorted((tmp_path / "d" / "train" / "images").iterdir())[:4]:
        image.unlink()
    with pytest.raises(DataError, match="4 missing images"):
        Trainer(scene_recipe(tmp_path / "d", tmp_path / "run"), lambda *a: None)
    Trainer(scene_recipe(tmp_path / "d", tmp_path / "run", "data.max_bad_fraction=0.2"), lambda *a: None)


def test_start_from_a_model(scenes: Path, whole: Path, tmp_path: Path) -> None:
    recipe = scene_recipe(scenes, tmp_path / "run", f"start.model={whole}")
    trainer = Trainer(recipe, lambda *a: None)
    start = load_model(str(whole))
    assert trainer.tokenizer.pieces == start.tokenizer.pieces
    assert equal(trainer.model.state_dict(), start.model.state_dict())
    with pytest.raises(CheckpointError, match="start.model does not fit"):
        Trainer(scene_recipe(scenes, tmp_path / "other", f"start.model={whole}", "model.width=16"), lambda *a: None)
    notes: list[str] = []
    deeper = scene_recipe(scenes, tmp_path / "deeper", f"start.model={whole}", "model.text_layers=2")
    Trainer(deeper, lambda kind, figures: notes.append(figures["text"]))
    assert any("from nothing: text" in note for note in notes)


def test_start_from_a_bert(scenes: Path, tmp_path: Path) -> None:
    """Text encoder, fusion and decoder; what went where is noted."""
    bert = make_bert()
    folder = save_bert(tmp_path / "bert", bert)
    start = {"text": str(folder), "fusion": "text", "decoder": "text", "layers": {"decoder": [5]}}
    notes: list[str] = []
    recipe = scene_recipe(scenes, tmp_path / "run", "model.max_positions=48", start=start)
    trainer = Trainer(recipe, lambda kind, figures: notes.append(figures["text"]))
    assert [note.split(" of ")[0] for note in notes] == [
        "text: layer 0", "fusion: layers 1-2", "decoder: layer 5", "left out"
    ]  # fmt: skip
    for part, number in (("text.layers.0", 0), ("fusion.layers.1.joint", 2), ("decoder.layers.0", 5)):
        own = trainer.model.get_parameter(f"{part}.feed_forward.up.weight")
        assert torch.equal(own, bert.bert.encoder.layer[number].intermediate.dense.weight), part
    with pytest.raises(CheckpointError, match="start.layers.decoder: .* has no layer 6"):
        Trainer(
            scene_recipe(scenes, tmp_path / "run", "model.max_positions=48", "start.layers.decoder=[6]", start=start),
            lambda *a: None,
        )


def test_a_source_is_cached_until_the_encoder_learns(photos: Path, tmp_path: Path) -> None:
    def recipe(folder: str, *freeze: str) -> Recipe:
        used = "sources: [photos, questions, statements]"
        stages = [f"{{name: s{k}, steps: 1, {used}, freeze: {parts}}}" for k, parts in enumerate(freeze)]
        return photo_recipe(photos, tmp_path / folder, f"stages=[{', '.join(stages)}]")

    seen: list[tuple[str, bool]] = []

    class Noting(Trainer):
        def _run_stage(self, stage: Any, checkpoint: Any) -> None:
            before = {name: value.clone() for name, value in self.model.visual.state_dict().items()}
            super()._run_stage(stage, checkpoint)
            learned = not equal(before, dict(self.model.visual.state_dict()))
            seen.extend((stage.name, source.cached, learned) for source in self.sources.values() if source.features)

    Noting(recipe("run", "[visual]", "[]", "[visual]"), lambda *a: None).run()
    assert seen == [
        (*stage,) for stage in (("s0", True, False), ("s1", False, True), ("s2", False, False)) for _ in "abc"
    ]
    train(recipe("other", "[]", "[text]"))
    assert not (tmp_path / "other" / "features").exists()


def test_scenes_of_a_run_are_those_of_its_recipe(scenes: Path, tmp_path: Path) -> None:
    def rendered(seed: int, resume: str = "never") -> int:
        changes = ("data.scenes.n=4", f"data.scenes.seed={seed}", "data.scenes.size=32", "steps=1")
        train(scene_recipe(scenes, tmp_path / "run", *changes), resume)
        return json.loads((tmp_path / "run" / "scenes" / "scenes.json").read_text())["seed"]

    assert [rendered(1), rendered(2)] == [1, 2]
    (tmp_path / "run" / "scenes" / "scenes.json").unlink()  # a run that was killed while it rendered
    shutil.rmtree(tmp_path / "run" / "scenes" / "val")
    (tmp_path / "run" / "scenes" / "train").rename(tmp_path / "run" / "scenes" / ".building")
    shutil.rmtree(tmp_path / "run" / "scenes" / "held_out")
    assert rendered(2) == 2
    with pytest.raises(CheckpointError, match="data.scenes.seed: 2 -> 3"):
        rendered(3, "auto")
    assert json.loads((tmp_path / "run" / "scenes" / "scenes.json").read_text())["seed"] == 2


def test_options_of_an_evaluation_are_checked_before_training(scenes: Path, tmp_path: Path) -> None:
    evaluate = {"val": {"path": str(scenes), "split": "train", "tasks": ["vqa"], "options": {"candidate": 3}}}
    with pytest.raises(RecipeError, match="evaluate.val.options: candidate"):
        Trainer(scene_recipe(scenes, tmp_path / "run", evaluate=evaluate), lambda *a: None)


def launch(
    recipe: Recipe, folder: Path, processes: int, stop: int = 0, timeout: int = 900
) -> subprocess.CompletedProcess[str]:
    """Train in processes of their own; with ``stop`` the first one gets a SIGTERM when it has logged that step."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    file = folder / "recipe.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe.model_dump_json())
    code = (
        "import os, signal, sys, torch\n"
        "from mplug_core.errors import Preempted\n"
        "from mplug_core.recipe import Recipe\n"
        "from mplug_core.training.distributed import end_process\n"
        "from mplug_core.training.trainer import train\n"
        "torch.set_num_threads(1)\n"
        "def watch(kind, figures):\n"
        f"    if kind == 'step' and figures['step'] == {stop}:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "try:\n"
        "    train(Recipe.model_validate_json(open(sys.argv[1]).read()), watch=watch)\n"
        "except Preempted as error:\n"
        "    print('PREEMPTED', error)\n"
        "end_process(0)\n"
    )
    script = folder / "train.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(file)]
    if processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script), str(file)]
        command = [sys.executable, *run]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
        env={**without_launcher(), "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_deepspeed_trains_as_plain_does(scenes: Path, tmp_path: Path) -> None:
    """Two stages, so that the second one starts from what the first one's engine leaves behind."""
    changes = ("engine.accumulate=2", "model.dropout=0")
    train(scene_recipe(scenes, tmp_path / "plain", *changes, stages=STAGES))
    recipe = scene_recipe(
        scenes, tmp_path / "zero", *changes, "engine.name=deepspeed", "engine.zero_stage=2", stages=STAGES
    )
    done = launch(recipe, tmp_path / "zero-files", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    want, got = metrics(tmp_path / "plain"), metrics(tmp_path / "zero")
    for name in ("loss", "patches", "grad_norm"):
        assert [g[name] for g in got] == pytest.approx([w[name] for w in want], rel=2e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes"), [(1, 2), (2, 1), (3, 1)])
def test_deepspeed_resumes_exactly(scenes: Path, tmp_path: Path, stage: int, processes: int) -> None:
    """Also when one process of several is told to stop: the others save with it."""
    changes = ("engine.name=deepspeed", f"engine.zero_stage={stage}", "engine.precision=auto", "run.average=0.9")
    whole = scene_recipe(scenes, tmp_path / "whole", *changes)
    cut = scene_recipe(scenes, tmp_path / "cut", *changes)
    done = [
        launch(whole, tmp_path / "files", processes),
        launch(cut, tmp_path / "files", processes, stop=4),
        launch(cut, tmp_path / "files", processes),
    ]
    assert [d.returncode for d in done] == [0, 0, 0], [d.stderr[-1500:] for d in done]
    assert ["PREEMPTED" in d.stdout for d in done] == [False, True, False]
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes(scenes: Path, tmp_path: Path, stage: int) -> None:
    # bf16, or on a CPU without units for it, where that takes many minutes, fp32
    changes = ("engine.name=deepspeed", f"engine.zero_stage={stage}", "engine.precision=auto")
    stages = [{"name": "see", "steps": 4, "objectives": {"patches": 1}}, {"name": "learn", "steps": 40}]
    recipe = scene_recipe(scenes, tmp_path / "run", *changes, stages=stages)
    done = launch(recipe, tmp_path / "files", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 45))
    assert lines[-1]["loss"] < lines[4]["loss"]
    load_model(str(tmp_path / "run"))
