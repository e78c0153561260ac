"""``mplug recipe`` and ``mplug pretrain``: shipped recipes, overrides, faults."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import yaml

RECIPE = "# A run to look at.\n#\n# more\nname: first\nseed: 3\nmodel: {size: tiny}\noptimizer: {lr: 1e-3}\n"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes as the package has it."""
    folder = tmp_path / "shipped"
    (folder / "pretrain").mkdir(parents=True)
    (folder / "pretrain" / "first.yaml").write_text(RECIPE)
    (folder / "pretrain" / "second-one.yaml").write_text(RECIPE.replace("# A run to look at.\n#\n# more\n", ""))
    monkeypatch.setattr("mplug_core.recipe.shipped_folder", lambda: folder)
    return folder


def test_ls(mplug, shipped):
    assert mplug("recipe", "ls").lines == ["pretrain/first       A run to look at.", "pretrain/second-one"]


def test_show_is_the_file(mplug, shipped):
    assert mplug("recipe", "show", "first").out == mplug("recipe", "show", "pretrain/first").out == RECIPE


def test_show_resolved(mplug, shipped, tmp_path):
    done = mplug("recipe", "show", "first", "--resolved", "seed=7", "optimizer.lr=3e-4")
    values = yaml.safe_load(done.out)
    assert (values["seed"], values["optimizer"]["lr"], values["model"]["width"]) == (7, 3e-4, 128)
    # what is printed is a recipe, and the same
    file = tmp_path / "again.yaml"
    file.write_text(done.out)
    assert mplug("recipe", "show", file, "--resolved").out == done.out
    assert mplug("recipe", "show", "first", "seed=7", "optimizer.lr=3e-4").out == done.out


def test_cp(mplug, shipped, tmp_path):
    assert mplug("recipe", "cp", "first", tmp_path).out == f"{tmp_path / 'first.yaml'}\n"
    assert (tmp_path / "first.yaml").read_text() == RECIPE
    done = mplug("recipe", "cp", "second-one", tmp_path / "first.yaml")
    assert done.code == 1 and "--force" in done.error
    assert (tmp_path / "first.yaml").read_text() == RECIPE
    assert mplug("recipe", "cp", "second-one", tmp_path / "first.yaml", "--force").code == 0
    assert (tmp_path / "first.yaml").read_text() != RECIPE
    assert mplug("recipe", "cp", "first", tmp_path / "none" / "x.yaml").code == 1
    assert mplug("recipe", "cp", "first", tmp_path / "x").code == 2


def test_validate(mplug, shipped):
    done = mplug("recipe", "validate", "first", "pretrain/second-one", "seed=9")
    assert (done.code, done.lines, done.err) == (0, ["first: ok", "pretrain/second-one: ok"], "")


def test_validate_names_all_faults(mplug, shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("mine.yaml")  # a long path would leave no room for the faults
    file.write_text("name: mine\nmodel: {size: tiny, widht: 3}\noptimiser: {lr: 1}\nteacher: {alpha: 2}\n")
    done = mplug("recipe", "validate", file, "first")
    assert (done.code, done.lines) == (3, ["first: ok"])
    for words in ("3 faults", "model.widht", "'width'", "optimiser", "'optimizer'", "teacher.alpha"):
        assert words in done.error


@pytest.mark.parametrize("command", [["recipe", "show"], ["recipe", "validate"], ["pretrain", "--recipe"]])
def test_an_unknown_recipe_names_the_nearest(mplug, shipped, command):
    done = mplug(*command, "frist")
    assert done.code == 3 and "'first'" in done.error


def test_validate_needs_a_recipe(mplug):
    assert mplug("recipe", "validate", "seed=3").code == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr", ["'optimizer.lr'", "key.path=value"]),
        ("optimizer.lrr=1", ["optimizer.lrr", "'lr'"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'"]),
        ("modell.width=3", ["modell", "'model'"]),
        ("seed={", ["seed"]),
    ],
)
def test_overrides_with_faults(mplug, shipped, override, words):
    done = mplug("pretrain", "--recipe", "first", override)
    assert (done.code, done.out) == (3, "") and all(word in done.error for word in words), done.error


def test_pretrain_runs_the_trainer(mplug, shipped, tmp_path, monkeypatch):
    calls = []
    trainer = types.SimpleNamespace(train=lambda recipe, resume, watch: calls.append((recipe, resume)))
    monkeypatch.setitem(sys.modules, "mplug_core.training.trainer", trainer)
    assert mplug("pretrain", "--recipe", "first", "seed=4", "--run", "there", "optimizer.lr=1e-5").code == 0
    assert mplug("pretrain", "--recipe", "first", "--resume", tmp_path).code == 0
    (recipe, resume), (_, second_resume) = calls
    assert (recipe.seed, recipe.run.folder, recipe.optimizer.lr, resume) == (4, "there", 1e-5, "auto")
    assert second_resume == str(tmp_path)


def test_a_checkpoint_that_is_not_there(mplug, shipped):
    done = mplug("pretrain", "--recipe", "first", "--resume", "nevr")
    assert done.code == 5 and "'never'" in done.error


def test_validate_standard_input(mplug, shipped):
    text = (shipped / "tiny.yaml").read_bytes() if (shipped / "tiny.yaml").is_file() else None
    text = text or next(shipped.rglob("*.yaml")).read_bytes()
    done = mplug("recipe", "validate", "-", stdin=text)
    assert (done.code, done.out) == (0, "standard input: ok\n"), done.err
    done = mplug("recipe", "validate", "-", "seed=x", stdin=text)
    assert done.code == 3 and "standard input" in done.error and "seed" in done.error
    done = mplug("recipe", "validate", "-", stdin=b"a: [1\n")
    assert done.code == 3 and "standard input:2:1: not YAML" in done.error
    assert mplug("recipe", "validate", "-", "-", stdin=text).code == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.text_layers=1000000000", "model.text_layers"),
        ("model.vision.image_size=100000", "model.vision.image_size"),
        ("model.vision.options={checkpoint_path: x}", "checkpoint_path: not allowed"),
        ("model.vision.options={act_layer: nonsense}", "act_layer"),
        ("model.vision.std=[0, 1, 1]", "model.vision.std"),
        ("model.vision.mean=[.nan, 1, 1]", "model.vision.mean"),
        ("model.layer_norm_eps=-1", "model.layer_norm_eps"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("seed=" + "9" * 5000, "more than 300 digits"),
        ("seed=" + "[" * 5000, "nested"),
        ("seed=2024-13-45", "seed"),
        ("name=" + "x" * 5000 + " y: z", "not YAML"),
    ],
)
def test_values_that_make_no_model(mplug, shipped, override, words):
    name = next(shipped.rglob("*.yaml"))
    done = mplug("recipe", "validate", str(name), override)
    assert done.code == 3 and words in done.error and len(done.error) <= 300


def test_more_faults_than_a_line_holds(mplug, shipped):
    name = next(shipped.rglob("*.yaml"))
    done = mplug("recipe", "validate", str(name), *[f"nothing_{number}=1" for number in range(40)])
    lines = done.err.splitlines()
    assert done.code == 3 and len(lines) == 40 and all(len(line) <= 300 for line in lines)
    done = mplug("recipe", "show", str(name), *[f"nothing_{number}=1" for number in range(40)])
    assert done.code == 3 and len(done.error) <= 300 and "and " in done.error and " more" in done.error
