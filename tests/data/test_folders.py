"""The walk of folders: one entry never costs the others, and no folder is visited twice."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mplug_core.data.folders import (
    IMAGE_SUFFIXES,
    NotAFile,
    has_image_suffix,
    images_in,
    matching,
    open_file,
    read_file,
)


def fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def names(root: Path, found: list[str]) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in found]


def test_images_of_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, "b.JPG", "a.jfif", "c.HEIC", "d.pjpeg", "notes.txt", "e", ".hidden.jpg", "sub/x.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder.jpg").symlink_to("sub")
    found = images_in(str(tmp_path))
    assert names(tmp_path, found.images) == ["a.jfif", "b.JPG", "c.HEIC", "d.pjpeg", "gone.png", "loop.jpg"]
    assert found.passed_over == 3 and not found.unreadable


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    found = images_in(str(tmp_path / "none"))
    assert not found.images and found.unreadable[0][0] == str(tmp_path / "none")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_suffixes_in_any_case(suffix: str) -> None:
    assert (
        has_image_suffix(f"x{suffix}") and has_image_suffix(f"X{suffix.upper()}") and not has_image_suffix(suffix[1:])
    )


def test_stars_follow_no_link_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "z/cat.jpg", "z/deep/dog.jpg", "top.jpg", ".hidden/x.jpg")
    (tmp_path / "z/up").symlink_to("..")
    (tmp_path / "z/deep/up").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to("z")  # the folder itself comes before links to it, whatever their names
    (tmp_path / "self").symlink_to("self")
    wanted = ["top.jpg", "z/cat.jpg", "z/deep/dog.jpg"]
    for pattern in ("**/*.jpg", "**/**/*.jpg", "**", "**/*.[jJ]pg"):
        assert names(tmp_path, matching(f"{tmp_path}/{pattern}").images) == wanted, pattern
    inner = ["z/deep/dog.jpg", "z/deep/up/top.jpg", "z/deep/up/z/cat.jpg"]
    assert names(tmp_path, matching(f"{tmp_path}/**/deep/**/*.jpg").images) == inner
    both = matching(f"{tmp_path}/[az]/**/*.jpg").images  # the same photos by two ways, each once
    assert sorted(Path(path).name for path in both) == ["cat.jpg", "dog.jpg", "top.jpg"]
    monkeypatch.chdir(tmp_path)
    assert matching("**/*.jpg").images == matching("**").images == wanted
    assert matching("./**/dog.jpg").images == ["./z/deep/dog.jpg"]
    assert matching("*.jpg").images == ["top.jpg"]
    assert matching("[az]/cat.jpg").images == ["a/cat.jpg", "z/cat.jpg"]  # both are named


def test_a_pattern_takes_folders_for_their_images(tmp_path: Path) -> None:
    fill(tmp_path, "in1/a.jpg", "in1/notes.txt", "in2/b.jpg")
    found = matching(f"{tmp_path}/in*")
    assert names(tmp_path, found.images) == ["in1/a.jpg", "in2/b.jpg"] and found.passed_over == 1


def test_an_unreadable_folder_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "good/a.jpg", "locked/b.jpg")
    scan = os.scandir

    def refuse(path: str) -> object:  # the superuser can read everything, so the refusal is played
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("mplug_core.data.folders.os.scandir", refuse)
    found = matching(f"{tmp_path}/**/a.jpg")
    assert names(tmp_path, found.images) == ["good/a.jpg"]
    assert [folder for folder, _ in found.unreadable] == [str(tmp_path / "locked")]


def test_only_files_are_opened(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    os.mkfifo(tmp_path / "pipe")
    start = time.perf_counter()
    for path, what in ((tmp_path / "pipe", "pipe"), (tmp_path, "folder"), ("/dev/zero", "device")):
        with pytest.raises(NotAFile, match=what):
            open_file(path)
    assert time.perf_counter() - start < 1
    (tmp_path / "large").write_bytes(b"x" * 50)
    assert read_file(tmp_path / "large", 50) == b"x" * 50 and len(read_file(tmp_path / "large", 49)) == 50
