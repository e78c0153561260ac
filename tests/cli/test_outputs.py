"""Every option and argument that names what a command writes: refused where it is an input, or can't be written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mplug_cli.app import COMMANDS, load_command
from mplug_core.bench import rerank
from mplug_core.bench.measure import Machine, Report
from tests.cli.conftest import save_random

INPUTS = {
    "--model", "--data", "--train", "--images", "--train-images", "--answers", "--answers-from", "--against",
    "--recipe", "--resume",
    "runs ls DIR", "runs show DIR", "model convert SRC", "model export MODEL", "model push MODEL", "model info MODEL",
    "data pack SRC", "data inspect PATH", "recipe show NAME|FILE", "recipe cp NAME|FILE", "recipe validate NAME|FILE|-",
}  # fmt: skip
"""Paths that are read, for all commands or one."""
FILES = {
    "eval --predictions", "eval --results", "ground --draw", "runs show --png", "runs show --html", "recipe cp TARGET",
    "bench decode --markdown", "bench rerank --markdown", "bench train --markdown", "bench load --markdown",
    "bench start --markdown", "ablate fusion --markdown",
}  # fmt: skip
FOLDERS = {
    "calibrate FOLDER", "model convert DST", "model export FOLDER", "data scenes OUT", "data pack OUT",
    "pretrain --run", "finetune --run", "ablate fusion --train",
}  # fmt: skip
PATHS = ("FILE", "FOLDER", "DIR", "PATH", "OUT", "DST", "SRC", "TARGET", "MODEL")
"""Words in the help that stand for paths."""


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if not inner:
        yield name, command
    for part, found in (inner or {}).items():
        yield from commands(f"{name} {part}", found)


def paths() -> set[str]:
    """Every option and argument of every command that is a path: ``eval --predictions``, ``data pack OUT``."""
    found = set()
    for name in COMMANDS:
        for full, command in commands(name, load_command(name)):
            for parameter in command.params:
                metavar = (getattr(parameter, "metavar", None) or "").strip("[].")
                word = metavar.split("]")[0].split("...")[0].strip("[].")
                kind = getattr(getattr(parameter, "type", None), "name", "")
                if "path" in kind.lower() or any(part in PATHS for part in word.split("|")):
                    shown = next((o for o in parameter.opts if o.startswith("--")), None) or word or parameter.name
                    found.add(f"{full} {shown}")
    return found


def test_every_path_is_known_as_input_or_output() -> None:
    """A new option that names a path belongs into one of the sets above, and an output into the tests below."""
    found = paths()
    inputs = {path for path in found if path in INPUTS or path.split()[-1] in INPUTS - FOLDERS}
    inputs -= FOLDERS | FILES
    assert found - inputs == FILES | FOLDERS
    assert BUILDERS.keys() | SAME_CODE == FILES


@pytest.fixture
def place(mplug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small inputs of every kind."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    lines = [{"image": f"{k}.png", "question": f"how many {k}?", "answer": str(k), "question_id": k} for k in range(4)]
    for k in range(4):
        Image.effect_noise((32, 32), 60).convert("RGB").save(f"data/{k}.png")
    Path("data/questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("run").mkdir()
    line = {"step": 1, "stage": "a", "stage_step": 1, "stage_steps": 1, "loss": 1.0}
    Path("run/metrics.jsonl").write_text((json.dumps(line) + "\n") * 2)
    Path("own.yaml").write_text("name: mine\n")

    def report(*arguments: Any, advance: Any = None, **options: Any) -> Report:
        return Report("rerank", "A title", ("way",), Machine.here(), [("mPLUG",)])

    monkeypatch.setattr(rerank, "bench_rerank", report)
    return tmp_path


EVAL = ("eval", "--task", "vqa", "--data", "data", "--model", "none", "--baseline", "majority", "--train", "data", "-q")
BUILDERS: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "eval --predictions": ((*EVAL, "--predictions"), ".jsonl", "data/questions.jsonl"),
    "eval --results": ((*EVAL, "--results"), ".json", "data/questions.jsonl"),
    "ground --draw": (("ground", "data/0.png", "a ball", "-q", "--draw"), ".png", "data/0.png"),
    "runs show --png": (("runs", "show", "run", "--png"), ".png", "run/metrics.jsonl"),
    "runs show --html": (("runs", "show", "run", "--html"), ".html", "run/metrics.jsonl"),
    "recipe cp TARGET": (("recipe", "cp", "own.yaml", "--force"), ".yaml", "own.yaml"),
    "bench rerank --markdown": (("bench", "rerank", "--markdown"), ".md", None),
}
SAME_CODE = {f"bench {name} --markdown" for name in ("decode", "train", "load", "start")} | {"ablate fusion --markdown"}
"""Whose file is written by the same function as that of ``bench rerank``."""


@pytest.mark.parametrize("name", BUILDERS)
def test_a_file_is_whole_or_as_it_was(mplug, able_folder, place: Path, name: str) -> None:
    command, suffix, _ = BUILDERS[name]
    for target in (f"out{suffix}", f"{'n' * 240}{suffix}"):
        for _ in range(2):
            done = mplug(*command, target)
            assert done.code == 0, done.err
            assert Path(target).stat().st_size > 1
    assert not list(place.glob(".*"))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_file_that_can_not_be_written_is_one_line(mplug, able_folder, place: Path, name: str) -> None:
    command, suffix, _ = BUILDERS[name]
    Path(f"full{suffix}").symlink_to("/dev/full")
    Path("file").write_text("")
    Path(f"folder{suffix}").mkdir()
    for target in (
        f"full{suffix}", f"none/x{suffix}", f"file/x{suffix}", f"{'x' * 300}{suffix}", f"/proc/x{suffix}",
        f"folder{suffix}",
    ):  # fmt: skip
        if name == "recipe cp TARGET" and target.startswith("folder"):
            continue  # it goes into the folder
        done = mplug(*command, target)
        assert done.code == 1, (target, done.err)
        error = done.err.splitlines()[-1]
        assert error.startswith("error: ") and "can't be written" in error and len(error) < 300, error
    assert Path("file").read_text() == "" and not list(place.glob(".*"))


@pytest.mark.parametrize("name", [name for name, (*_, own) in BUILDERS.items() if own])
def test_a_file_is_none_of_the_inputs(mplug, able_folder, place: Path, name: str, monkeypatch) -> None:
    command, suffix, own = BUILDERS[name]
    before = Path(own).read_bytes()
    Path(f"link{suffix}").symlink_to(own)
    os.link(own, f"hard{suffix}")
    Path("other").symlink_to(Path(own).parent)
    monkeypatch.setattr("mplug_cli.ground.load", lambda *a, **k: pytest.fail("a model was read"))
    for target in (own, f"link{suffix}", f"hard{suffix}", f"./{own}", place / own, f"other/{Path(own).name}"):
        done = mplug(*command, target)
        assert done.code == 2, (target, done.err)
        assert "would write over" in done.error and Path(own).read_bytes() == before
    assert not list(place.glob(".*"))


def test_files_of_input_folders(mplug, place: Path) -> None:
    """Also what is not read now: images, other splits, a model, a run's own files; reports of before are replaced."""
    model = save_random(place / "model", box_bins=16)
    Path("data/other.jsonl").write_text('{"image": "0.png", "caption": "a ball"}\n')
    Path("run/recipe.yaml").write_text("name: mine\n")
    cases = [
        (*EVAL, "--predictions", "data/0.png"), (*EVAL, "--predictions", "data/other.jsonl"),
        (*EVAL, "--results", "data/0.png"), ("runs", "show", "run", "--html", "run/recipe.yaml"),
        ("runs", "show", "run", "--png", "same", "--html", "same"),
        ("ground", "data/0.png", "a ball", "--model", model, "--draw", model / "x.png"),
    ]  # fmt: skip
    (model / "x.png").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for case in cases:
        done = mplug(*case)
        assert done.code == 2 and "would write over" in done.error, done.err
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for _ in range(2):
        assert mplug("runs", "show", "run", "--html", "run/report.html", "--png", "run/report.png").code == 0


def test_a_wrong_model_leaves_the_old_predictions(mplug, place: Path) -> None:
    Path("old.jsonl").write_text("old")
    done = mplug("eval", "--task", "vqa", "--data", "data", "--model", "no/such/model", "--predictions", "old.jsonl")
    assert done.code == 5 and Path("old.jsonl").read_text() == "old" and not list(place.glob(".*"))


FOLDER_CALLS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "calibrate FOLDER": lambda place: ("calibrate", "--data", place / "data", "--task", "vqa"),
    "model convert DST": lambda place: ("model", "convert", place / "model"),
    "model export FOLDER": lambda place: ("model", "export", place / "model"),
    "data scenes OUT": lambda place: ("data", "scenes", "--n", "1", "--size", "32", "-q"),
    "data pack OUT": lambda place: ("data", "pack", place / "data", "-q"),
    "pretrain --run": lambda place: ("pretrain", "--recipe", "tiny", f"data.root={place}", "--run"),
    "finetune --run": lambda place: ("finetune", "--recipe", "scenes", f"data.root={place}", "--run"),
    "ablate fusion --train": lambda place: ("ablate", "fusion", "--train"),
}


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_folder_that_is_of_something_else_or_can_not_be_written(mplug, place: Path, name: str, monkeypatch) -> None:
    save_random(place / "model")
    monkeypatch.setenv("MPLUG_MODEL", str(place / "model"))
    Path("mine").mkdir()
    for file in ("best", "notes.txt", "model.safetensors"):
        Path("mine", file).write_text("mine")
    Path("file").write_text("")
    call = FOLDER_CALLS[name](place)
    code = 2 if name in ("pretrain --run", "finetune --run", "ablate fusion --train", "data scenes OUT") else None
    for target in ("mine", "file", "file/x", "x" * 300, "/proc/none/x"):
        done = mplug(*call, target)
        assert done.code in ((code,) if code and target == "mine" else (1, 2, 3)), (target, done.err)
        error = done.err.splitlines()[-1]
        assert error.startswith("error: ") and "internal" not in error and len(error) < 300, error
    assert {file.name: file.read_text() for file in Path("mine").iterdir()} == dict.fromkeys(
        ("best", "notes.txt", "model.safetensors"), "mine"
    )
    assert not list(place.glob(".*")) and Path("x" * 300).name not in os.listdir()
    assert sorted(os.listdir()) == ["data", "file", "mine", "model", "own.yaml", "run"]
