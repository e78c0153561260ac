"""``mplug finetune``: what is started from, and that the options are the recipe's fields."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from mplug_cli import watch
from mplug_core.recipe import Recipe
from mplug_core.training.trial import Share

RECIPE = "name: further\ndata: {sources: {a: {path: '{root}/a', tasks: {vqa: 1}}}}\nobjectives: {answer: 1, box: 1}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "further.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def trained(mplug, monkeypatch) -> Callable[..., tuple[Recipe, str]]:
    """Calls the command and gives what it would train: the recipe, and what it resumes."""
    calls: list[tuple[Recipe, str]] = []
    trainer = types.SimpleNamespace(train=lambda recipe, resume, watch: calls.append((recipe, resume)))
    monkeypatch.setitem(sys.modules, "mplug_core.training.trainer", trainer)

    def call(*arguments: object) -> tuple[Recipe, str]:
        done = mplug("finetune", *arguments)
        assert done.code == 0, done.err
        return calls.pop()

    return call


def test_the_start_is_the_embedded_model_unless_something_else_is_named(trained, recipe, monkeypatch):
    """A box objective needs no model section: whether the model has box tokens shows when it is read."""
    assert trained("--recipe", recipe)[0].start.model == "mini"
    monkeypatch.setenv("MPLUG_MODEL", "my/model")
    assert trained("--recipe", recipe)[0].start.model == "my/model"
    recipe.write_text(RECIPE + "start: {model: base.pth}\n")
    assert trained("--recipe", recipe)[0].start.model == "base.pth"
    assert trained("--recipe", recipe, "--model", "a: [b")[0].start.model == "a: [b"


def test_options_are_fields(trained, recipe):
    settings, resume = trained("--recipe", recipe, "--data", "x: y", "--run", "here", "optimizer.lr=3e-5")
    assert (settings.data.root, settings.run.folder, settings.optimizer.lr) == ("x: y", "here", 3e-5)
    assert resume == "auto"


def test_it_trains(trained, recipe):
    settings, resume = trained("--recipe", recipe, "steps=4", "--resume", "never")
    assert (settings.steps, settings.start.model, resume) == (4, "mini", "never")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["steps=x"], 3, "steps"),
        (["--resume", "nevr"], 5, "'never'"),
        (["run.patience=2"], 3, "run.patience: needs run.best"),
        (["run.best=val/vqa/accuracy"], 3, "run.best: no evaluation 'val/vqa'"),
    ],
)
def test_faults(mplug, recipe, arguments, code, words):
    done = mplug("finetune", "--recipe", recipe, *arguments)
    assert done.code == code and words in done.error


def test_a_recipe_is_needed(mplug):
    assert mplug("finetune").code == 2


SCORES = {"last": {"val/vqa/accuracy": 0.25, "val/vqa/accuracy_color": 0.5}, "best": {"val/vqa/accuracy": 0.75}}


def test_table_at_the_end(capsys):
    watch.plain("scores", {**SCORES, "at": {"last": 8, "best": 4}})
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert rows == [
        ["metric", "last,", "step", "8", "best,", "step", "4"],
        ["val/vqa/accuracy", "0.2500", "0.7500"],
        ["val/vqa/accuracy_color", "0.5000", "-"],
    ]
    watch.plain("scores", {"last": SCORES["last"], "best": {}, "at": {"last": 8, "best": 0}})
    assert capsys.readouterr().err.splitlines()[1].split() == ["val/vqa/accuracy", "0.2500"]
    watch.plain("scores", {**SCORES, "at": {"last": 8, "best": 4}}, quiet=True)
    assert capsys.readouterr().err == ""
    assert watch.score_table({**SCORES, "at": {"last": 8, "best": 4}}).row_count == 2


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_try(mplug, recipe, monkeypatch, command):
    calls = []
    shares = [Share("features of images", 20000, 0.02), Share("stage learn: steps", 1500, 1.234)]

    def try_run(recipe, steps, watch):
        calls.append((recipe.name, steps))
        return shares

    trial = types.SimpleNamespace(try_run=try_run)
    monkeypatch.setitem(sys.modules, "mplug_core.training.trial", trial)
    start = ("start.model=mini",) if command == "pretrain" else ()
    done = mplug(command, "--recipe", recipe, *start, "--try", "5")
    assert (done.code, calls) == (0, [("further", 5)]), done.err
    assert done.lines == [
        "features of images  20000 x 0.02 s  0:06:40",
        "stage learn: steps   1500 x 1.23 s  0:30:51",
        "the whole run                       0:37:31",
    ]
    shares.clear()  # as on all processes but the first
    assert mplug(command, "--recipe", recipe, *start, "--try", "5").out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--try", "0"], "--try"),
        (["--try", "2", "--resume", "never"], "a try starts anew each time"),
        (["--try", "2", "--dry-run"], "--try runs, and --dry-run doesn't"),
    ],
)
def test_a_try_is_no_other_thing(mplug, recipe, arguments, words):
    done = mplug("finetune", "--recipe", recipe, *arguments)
    assert done.code == 2 and words in done.err
