"""Folders and files that are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mplug_core import atomic
from mplug_core.atomic import copy_folder, exchange, replace_folder, replace_text, whole_folder


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a").write_text(text)
    return path


def test_exchange_changes_names_and_says_if_it_cannot(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", "1"), folder(tmp_path / "other", "2")
    if not exchange(one, other):
        pytest.skip("this file system can't exchange names")
    assert ((one / "a").read_text(), (other / "a").read_text()) == ("2", "1")
    assert not exchange(one, tmp_path / "none")
    assert (one / "a").read_text() == "2"


@pytest.mark.parametrize("able", [True, False])
def test_new_folder_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    if not able:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    for text in ("first", "second"):
        replace_folder(folder(tmp_path / ".m-new", text), tmp_path / "m")
        assert (tmp_path / "m" / "a").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_at_no_moment_is_there_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call a kill comes before, the folder is there whole: every call on the disk is looked at."""
    target = folder(tmp_path / "m", "old")
    if not exchange(target, folder(tmp_path / "x", "new")):
        pytest.skip("this file system can't exchange names")
    seen = []

    def spy(name: str) -> None:
        real = getattr(os, name)

        def called(*args, **kwargs):
            seen.append((target / "a").read_text())
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, called)

    for name in ("rename", "unlink", "rmdir", "fsync", "open"):
        spy(name)
    replace_folder(tmp_path / "x", target)
    monkeypatch.undo()
    assert seen == ["new"] * seen.count("new") + ["old"] * seen.count("old") and set(seen) == {"old", "new"}


def test_failed_text_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t"
    replace_text(file, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        replace_text(file, "new")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("able", [True, False])
def test_copy_shares_weights_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    source = folder(tmp_path / "m", "text")
    (source / "model.safetensors").write_text("weights")
    if not able:

        def cannot(one: Path, other: Path) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", cannot)
    copy_folder(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_text() == "weights"
    assert (tmp_path / "copy" / "model.safetensors").samefile(source / "model.safetensors") == able
    assert not (tmp_path / "copy" / "a").samefile(source / "a"), "texts are edited in place"


@pytest.mark.parametrize("able", [True, False])
def test_what_killed_processes_have_left_beside_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    if not able:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    for name in (".m-0123abcd.new", ".m-ab_cd123", ".m-ab_cd124"):  # the last two are of an earlier version
        folder(tmp_path / name, "half")
    folder(tmp_path / ".m-ab_cd125", "of the user").joinpath("notes").write_text("mine")
    folder(tmp_path / "m", "old")
    with whole_folder(tmp_path / "m") as beside:
        (beside / "a").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m-ab_cd125", "m"]
    assert (tmp_path / "m" / "a").read_text() == "new"


def test_a_folder_that_was_put_aside_gets_its_name_back(tmp_path: Path) -> None:
    """A kill came between two renames: neither name is lost, and what fails next changes nothing."""
    folder(tmp_path / ".m-0123abcd.new.old", "old")
    folder(tmp_path / ".m-0123abcd.new", "new")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "m"):
        raise KeyboardInterrupt
    assert (tmp_path / "m" / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["m"]
