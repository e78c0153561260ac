"""Every option of the training commands reaches what it names, in every shipped recipe, or says why it does not."""

from __future__ import annotations

import sys
import types

import pytest

from mplug_core.recipe import EvaluateSection, Recipe, load_recipe, shipped_recipes

NAMES = [name for name in shipped_recipes() if not name.startswith("ablation/")]


@pytest.fixture
def trained(mplug, monkeypatch):
    """Calls a training command; the recipe that it would train, or its outcome where it refuses."""
    calls = []
    trainer = types.SimpleNamespace(train=lambda recipe, resume, watch: calls.append(recipe))
    monkeypatch.setitem(sys.modules, "mplug_core.training.trainer", trainer)
    monkeypatch.setattr("mplug_cli.pretrain.processes_wanted", lambda devices, engine: 1)

    def call(name, *arguments):
        done = mplug(name.partition("/")[0], "--recipe", name, *arguments)
        return (calls.pop() if done.code == 0 else None), done

    return call


def places(recipe: Recipe) -> list[str]:
    return [recipe.placed(spec).path for spec in (*recipe.data.sources.values(), *recipe.evaluate.values())]


@pytest.mark.parametrize("name", NAMES)
def test_data(trained, name):
    """All data is below the folder, but for scenes that the run renders."""
    recipe, done = trained(name, "--data", "/my: data", "--run", "/my/run")
    assert done.code == 0, done.err
    found = [place for place in places(recipe) if not place.startswith("/my/run/scenes")]
    assert found and all(place.startswith("/my: data") for place in found)
    if name == "finetune/scenes":
        assert places(recipe) == ["/my: data"] * 2 and not recipe.renders_scenes()


@pytest.mark.parametrize("name", NAMES)
def test_run_and_model_and_fields(trained, name):
    given = ["--run", "/my/run", "optimizer.lr=0.125", "seed=77"]
    given += ["--model", "my: model"] if name.startswith("finetune/") else []
    recipe, done = trained(name, *given)
    assert done.code == 0, done.err
    assert (str(recipe.run_folder), recipe.optimizer.lr, recipe.seed) == ("/my/run", 0.125, 77)
    if name.startswith("finetune/"):
        assert recipe.start.model == "my: model"
    assert not any("{" in place for place in places(recipe))


def test_the_scenes_of_a_recipe_without_data_are_its_own(trained):
    recipe, _ = trained("finetune/scenes", "--run", "/my/run")
    assert places(recipe) == ["/my/run/scenes"] * 2 and recipe.renders_scenes()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize("given", [["--data", "elsewhere"], ["data.root=elsewhere"]])
def test_data_that_no_path_follows_is_refused(mplug, tmp_path, command, given):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndata: {sources: {photos: {path: /photos}}}\n")
    done = mplug(command, "--recipe", file, *given)
    assert done.code == 3 and "data.root (--data) changes nothing" in done.error
    assert "data.sources.photos.path=/photos" in done.error


def test_images_of_a_source_follow_the_data():
    recipe = load_recipe("snli_ve_flickr8k", ["data.root=/d"])
    specs = [*recipe.data.sources.values(), *recipe.evaluate.values()]
    assert {recipe.placed(spec).images for spec in specs} == {"/d/flickr8k/images"}


# -- evaluations -------------------------------------------------------------------------------------------------------


def test_answers_are_not_evaluated_while_only_patches_are_trained():
    recipe = load_recipe("tiny")
    tasks = [task for section in recipe.evaluate.values() for task in section.tasks]
    wanted = {stage.name: [task for task in tasks if recipe.evaluates_in(stage, task)] for stage in recipe.stages}
    assert wanted == {"see": [], "learn": tasks, "all": tasks}


def test_what_a_model_brings_is_evaluated_from_the_start_and_what_nobody_trains_too():
    stages = "stages=[{name: a, steps: 1, objectives: {patches: 1}}, {name: b, steps: 1, objectives: {itc: 1}}]"
    recipe = load_recipe("tiny", [stages])
    first, second = recipe.stages
    assert [recipe.evaluates_in(first, task) for task in ("caption", "retrieval")] == [True, False]
    assert recipe.evaluates_in(second, "retrieval")
    started = load_recipe("tiny", ["start.model=mini"])
    assert all(started.evaluates_in(started.stages[0], task) for task in ("vqa", "retrieval", "statements"))


def test_every_evaluated_task_has_teachers():
    from typing import get_args

    from mplug_core.recipe import TEACHERS, EvaluatedName, Objective

    assert set(TEACHERS) == set(get_args(EvaluatedName))
    assert frozenset().union(*TEACHERS.values()) <= set(get_args(Objective))
    assert "tasks" in EvaluateSection.model_fields
