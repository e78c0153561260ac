"""``--dry-run``: the recipe that would be trained, what it would cost and lack; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mplug_core.data.scenes import write_scenes
from tests.training.recipes import scene_recipe


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose data are there."""
    place = tmp_path_factory.mktemp("dry")
    write_scenes(place / "scenes", 40, 0, 48)
    tasks = ("data.sources.scenes.tasks={pretrain: 1}", "objectives={itc: 1, prefix_lm: 1}")
    recipe = scene_recipe(place / "scenes", place / "run", *tasks, "engine.name=deepspeed")
    (place / "recipe.yaml").write_text(recipe.model_dump_json(), encoding="utf-8")
    return place / "recipe.yaml"


def test_a_recipe_that_can_be_run_and_its_costs_as_comments(mplug, file, tmp_path):
    done = mplug("pretrain", "--recipe", file, "--dry-run", "seed=8", "--run", "a: b", "--device-name", "h100")
    assert done.code == 0, done.err
    values = yaml.safe_load(done.out)
    assert (values["seed"], values["run"]["folder"], values["steps"]) == (8, "a: b", 6)
    comments = [line for line in done.lines if line.startswith("#")]
    for words in ("stage train: 6 steps of 8 images", "h on h100", "decoder", "GFLOP an image", "data", "disk: "):
        assert any(words in line for line in comments), words
    assert not any("a100" in line for line in comments)
    assert not Path("a: b").exists()
    (tmp_path / "again.yaml").write_text(done.out, encoding="utf-8")
    assert mplug("recipe", "validate", tmp_path / "again.yaml").code == 0


def test_json(mplug, file):
    done = mplug("pretrain", "--recipe", file, "--dry-run", "--json", "--devices", "16", "--device-name", "A100")
    (report,) = done.objects
    assert (done.code, report["processes"], report["steps"]) == (0, 16, 6)
    assert set(report["hours"]) == {"a100"} and report["stages"][0]["images_per_step"] == 128


def test_faults_end_with_their_code_and_all_are_in_the_report(mplug, file):
    done = mplug("pretrain", "--recipe", file, "--dry-run", "--json", "data.sources.scenes.path=nowhere")
    assert done.code == 3 and "there is no data at nowhere" in done.err
    assert json.loads(done.out)["faults"][0]["exit_code"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json"], "--json is for --dry-run"),
        (["--device-name", "a100"], "--device-name is for --dry-run"),
        (["--dry-run", "--device-name", "abacus"], "abacus: no such device"),
        (["--dry-run", "--devices", "some"], "--devices some"),
    ],
)
def test_usage(mplug, file, arguments, words):
    done = mplug("pretrain", "--recipe", file, *arguments)
    assert done.code == 2 and words in done.error
