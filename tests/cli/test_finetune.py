"""``mplug finetune``: what is started from, and that the options are the recipe's fields."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import yaml

from mplug_cli import watch

RECIPE = "name: further\ndata: {sources: {a: {path: '{root}/a', tasks: {vqa: 1}}}}\nobjectives: {answer: 1, box: 1}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "further.yaml"
    file.write_text(RECIPE)
    return file


def shown(mplug, *arguments) -> dict:
    done = mplug("finetune", *arguments, "--dry-run")
    assert done.code == 0, done.err
    return yaml.safe_load(done.out)


def test_the_start_is_the_embedded_model_unless_something_else_is_named(mplug, recipe, monkeypatch):
    """A box objective needs no model section: whether the model has box tokens shows when it is read."""
    assert shown(mplug, "--recipe", recipe)["start"]["model"] == "mini"
    monkeypatch.setenv("MPLUG_MODEL", "my/model")
    assert shown(mplug, "--recipe", recipe)["start"]["model"] == "my/model"
    recipe.write_text(RECIPE + "start: {model: base.pth}\n")
    assert shown(mplug, "--recipe", recipe)["start"]["model"] == "base.pth"
    assert shown(mplug, "--recipe", recipe, "--model", "a: [b")["start"]["model"] == "a: [b"


def test_options_are_fields(mplug, recipe):
    values = shown(mplug, "--recipe", recipe, "--data", "x: y", "--run", "here", "optimizer.lr=3e-5")
    assert (values["data"]["root"], values["run"]["folder"], values["optimizer"]["lr"]) == ("x: y", "here", 3e-5)


def test_it_trains(mplug, recipe, monkeypatch):
    calls = []
    trainer = types.SimpleNamespace(train=lambda recipe, resume, watch: calls.append((recipe, resume)))
    monkeypatch.setitem(sys.modules, "mplug_core.training.trainer", trainer)
    assert mplug("finetune", "--recipe", recipe, "steps=4", "--resume", "never").code == 0
    ((settings, resume),) = calls
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
