"""The note on the embedded model comes once a day, whatever happens to the folder that remembers it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mplug_cli.daily import is_due

HOUR = 3600.0
NOTE = "demonstration model"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home"
    monkeypatch.setenv("MPLUG_HOME", str(place))
    return place


@pytest.fixture
def move_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``move_clock(-3600.0)`` sets the clock back by an hour."""
    real, moved = time.time, [0.0]
    monkeypatch.setattr("time.time", lambda: real() + moved[0])

    def move(seconds: float) -> None:
        moved[0] += seconds

    return move


@pytest.mark.parametrize("command", ["caption", "vqa"])
def test_once_a_day(
    command: str, mplug, photo: Path, model_folder: Path, home: Path, move_clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mplug_core.weights.folder.EMBEDDED", model_folder)
    call = (command, photo, *(["what is it?"] if command == "vqa" else []))
    assert mplug(*call, "--quiet").err == "" and not home.exists()  # quiet is not to have shown it
    assert mplug(*call).err.count(NOTE) == 1
    for hours in (0, 1, 22):
        move_clock(hours * HOUR)
        assert mplug(*call).err == ""
    move_clock(2 * HOUR)
    assert mplug(*call, "--quiet").err == ""
    assert mplug(*call).err.count(NOTE) == 1
    assert mplug(*call).err == ""


def test_other_models_have_no_note(mplug, photo: Path, model_folder: Path, home: Path) -> None:
    assert mplug("caption", photo).err == "" and not home.exists()


@pytest.mark.parametrize("back", [HOUR, 48 * HOUR, 10000 * HOUR])
def test_a_clock_that_is_set_back(back: float, home: Path, move_clock: Callable[[float], None]) -> None:
    """The note comes again rather than never, and again once a day."""
    assert is_due("x") and not is_due("x")
    move_clock(-back)
    assert is_due("x") and not is_due("x")


def test_notes_are_remembered_apart(home: Path) -> None:
    assert is_due("x") and is_due("y") and not is_due("x") and not is_due("y")


def test_home_is_a_file(home: Path) -> None:
    home.write_text("no folder")
    assert is_due("x") and is_due("x")
    assert home.read_text() == "no folder"


@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "filelock.FileLock.acquire", "pathlib.Path.touch"])
def test_a_home_that_can_not_be_written(call: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a read-only one, another user's folder: the note is shown, and nothing breaks."""

    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(call, refuse)
    assert is_due("x") and is_due("x")


def test_of_parallel_calls_one_shows_it(home: Path) -> None:
    """Twelve processes wait for a file, then ask at once."""
    code = (
        "import sys, time, pathlib, mplug_cli.daily as d, filelock, mplug_core.weights.cache\n"
        "print('ready', flush=True); sys.stdin.readline(); print(d.is_due('x'))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    calls = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(12)
    ]
    for call in calls:
        assert call.stdout is not None and call.stdout.readline() == "ready\n"
    for call in calls:
        assert call.stdin is not None
        call.stdin.write("\n")
        call.stdin.flush()
    answers = [call.communicate()[0].strip() for call in calls]
    assert sorted(answers) == ["False"] * 11 + ["True"]
