"""A try: a few steps of every stage of any recipe, in a folder of its own, and what the whole run would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mplug_core.errors import UsageError
from mplug_core.recipe import Recipe, load_recipe, shipped_recipes
from mplug_core.training.journal import Journal
from mplug_core.training.trainer import Trainer, train
from mplug_core.training.trial import EVALUATED, Share, clear, short_recipe, try_run
from tests.training.photos import photo_recipe, write_photos
from tests.training.recipes import scene_recipe


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data", n=120)


class Events:
    """Keeps the events of a run by kind."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, kind: str, figures: dict[str, Any]) -> None:
        self.kinds.setdefault(kind, []).append(figures)


def counts(shares: list[Share]) -> dict[str, int]:
    """How often each part comes in the whole run."""
    assert all(share.seconds == share.count * share.each_seconds > 0 for share in shares)
    return {share.part: share.count for share in shares}


def steps_of(folder: Path) -> list[tuple[str, int]]:
    """Stage and step of the run's log."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["stage_step"]) for line in lines if "loss" in line]


def test_stages_features_and_captions_alone(photos: Path, tmp_path: Path) -> None:
    evaluate = f"evaluate={{val: {{path: '{photos}', split: train, tasks: [vqa], limit: 100}}}}"
    lengths = ("stages.align.steps=40", "stages.learn.steps=90", "run.evaluate_every=20", "run.patience=1")
    recipe = photo_recipe(photos, tmp_path / "run", evaluate, "run.best=val/vqa/accuracy", *lengths)
    events = Events()
    shares = try_run(recipe, 2, events)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-try"]
    assert steps_of(tmp_path / "run-try") == [("learn", 1), ("learn", 2)]
    done = max(figures["done"] for figures in events.kinds["features"] if figures["of"] == "images")
    assert done < 2 * 120, "of all photos two views would be computed"
    assert counts(shares) == {
        "features of images": 240, "stage align: captions": 2 * 120 + 240, "stage align: steps": 2 * 40,
        "stage learn: steps": 90, "evaluations": 5,
    }  # fmt: skip
    (evaluated,) = events.kinds["evaluation"]
    assert shares[-1].each_seconds == pytest.approx(evaluated["evaluation_seconds"] * 100 / EVALUATED)


def test_no_stages_and_epochs(scenes: Path, tmp_path: Path) -> None:
    """The length of the whole run is that of all its images, of which the try draws a few."""
    recipe = scene_recipe(scenes, tmp_path / "run", "steps=null", "epochs=7", "engine.accumulate=2")
    shares = try_run(recipe, 3)
    assert steps_of(tmp_path / "run-try") == [("train", 1), ("train", 2), ("train", 3)]
    per_epoch = Trainer(recipe, lambda *a: None).sources["scenes"].steps_per_epoch(2)
    assert counts(shares) == {"stage train: steps": 7 * per_epoch}


def test_two_stages(scenes: Path, tmp_path: Path) -> None:
    stages = [{"name": "see", "steps": 40, "objectives": {"patches": 1}}, {"name": "learn", "steps": 50}]
    shares = try_run(scene_recipe(scenes, tmp_path / "run", stages=stages), 1)
    assert steps_of(tmp_path / "run-try") == [("see", 1), ("learn", 1)]
    assert counts(shares) == {"stage see: steps": 40, "stage learn: steps": 50}


def test_starts_anew_and_leaves_the_run_alone(scenes: Path, tmp_path: Path) -> None:
    recipe = scene_recipe(scenes, tmp_path / "run")
    train(recipe)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    for steps in (4, 2):
        try_run(recipe, steps)
        assert steps_of(tmp_path / "run-try") == [("train", k + 1) for k in range(steps)]
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    assert len(list((tmp_path / "run-try" / "checkpoints").glob("step-*"))) == 1


def test_what_is_no_try_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not of a run, and is left as it is"):
        clear(tmp_path / "mine")
    clear(tmp_path / "nothing")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "recipe.yaml").write_text("")
    Journal(tmp_path / "used").begin(0, resumed=False)
    clear(tmp_path / "used")  # by this very process
    assert not (tmp_path / "used").exists() and (tmp_path / "mine" / "letter.txt").exists()


@pytest.mark.parametrize("name", shipped_recipes())
def test_any_recipe_becomes_short(name: str) -> None:
    """Nothing but lengths, the amount of data and the folder changes."""
    whole = load_recipe(name)
    short = short_recipe(whole, 3, lots=2)
    assert Recipe.model_validate(short.model_dump()) == short
    assert all(stage.steps == 3 for stage in short.stages) and (short.stages or short.steps == 3)
    assert short.run_folder == whole.run_folder.with_name(f"{whole.run_folder.name}-try")
    assert all(section.limit <= EVALUATED and "limit" not in section.options for section in short.evaluate.values())
    assert (short.data.scenes is None) == (whole.data.scenes is None)
    assert short.data.scenes is None or short.data.scenes.n <= whole.data.scenes.n
    for part in ("model", "start", "objectives", "optimizer", "teacher", "engine", "freeze"):
        assert getattr(short, part) == getattr(whole, part)


@pytest.mark.slow
def test_shipped_recipes_of_scenes(scenes: Path, tmp_path: Path) -> None:
    """Pre-training in stages, and fine-tuning of what that has made."""
    small = ("engine.name=plain", "engine.threads=1", "data.sources.scenes.batch_size=4", f"data.root={scenes}")
    tiny = load_recipe("tiny", [*small, f"run.folder={tmp_path / 'tiny'}"])
    shares, folder = try_run(tiny, 1), tmp_path / "tiny-try"
    assert steps_of(folder) == [(stage.name, 1) for stage in tiny.stages]
    steps = {f"stage {stage.name}: steps": stage.steps for stage in tiny.stages}
    # every 600 steps of 1500, 6000 and 1200
    assert counts(shares) == {**steps, "evaluations": 3 + 10 + 2}
    changes = [*small, f"run.folder={tmp_path / 'further'}", f"start.model={folder / 'model'}"]
    further = load_recipe("finetune/scenes", changes)
    assert counts(try_run(further, 2))["stage train: steps"] == 1500
    assert steps_of(tmp_path / "further-try") == [("train", 1), ("train", 2)]
