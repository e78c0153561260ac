"""Files that are replaced whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mplug_core import atomic
from mplug_core.atomic import sole_writer, whole_file, whole_folder
from mplug_core.errors import MplugError


def test_the_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for text in ("first", "second"):
        before = file.read_text() if file.exists() else None
        with whole_file(file) as stream:
            stream.write(text)
            stream.flush()
            assert (file.read_text() if file.exists() else None) == before
        assert file.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_what_was_there_stays_where_writing_fails(tmp_path: Path, fault: type[BaseException]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("before")
    with pytest.raises(fault), whole_file(file) as stream:
        stream.write("half")
        raise fault
    assert file.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="links and modes")
def test_links_and_modes_stay(tmp_path: Path) -> None:
    file, link = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("before")
    file.chmod(0o640)
    link.symlink_to(file)
    with whole_file(link) as stream:
        stream.write("after")
    assert link.is_symlink() and file.read_text() == "after" and file.stat().st_mode & 0o777 == 0o640


def test_what_can_not_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), whole_file(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "none" / "a"):
        pass
    if Path("/dev/null").exists():
        with whole_file("/dev/null") as stream:
            stream.write("away")
        assert not Path("/dev/null").is_file()


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with whole_file(file) as one, whole_file(file) as other:
        one.write("one")
        other.write("other")
    assert file.read_text() == "one" and [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_the_dead_have_left_goes_and_what_the_living_write_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    (tmp_path / ".a.jsonl-0123abcd.new").write_text("of a killed process")
    theirs = [tmp_path / name for name in (".a.jsonl-0123abcd", ".a.jsonl-notes.new", ".b-0123abcd.new")]
    for path in theirs:
        path.write_text("of the user")
    with whole_file(file) as stream:
        (beside,) = [path for path in tmp_path.glob(".a.jsonl-*.new") if path not in theirs]
        with whole_file(file) as other:
            assert beside.exists()
            other.write("x")
        stream.write("y")
    assert sorted(tmp_path.iterdir()) == sorted([file, *theirs]) and file.read_text() == "y"


@pytest.mark.parametrize("name", ["n" * 250, "é" * 120, "n" * 200 + ".jsonl"])
def test_long_names(tmp_path: Path, name: str) -> None:
    with whole_file(tmp_path / name) as stream:
        stream.write("x")
    with whole_folder(tmp_path / "folder" / name) as beside:
        (beside / "x").write_text("x")
    assert (tmp_path / name).read_text() == (tmp_path / "folder" / name / "x").read_text() == "x"
    with pytest.raises(OSError), whole_file(tmp_path / (name * 3)):
        pass


def test_full_disk_and_pipes(tmp_path: Path) -> None:
    if Path("/dev/full").exists():
        (tmp_path / "full").symlink_to("/dev/full")
        for file in (Path("/dev/full"), tmp_path / "full"):
            with pytest.raises(OSError, match="No space left"), whole_file(file) as stream:
                stream.write("x")
    reader, writer = os.pipe()
    with whole_file(f"/dev/fd/{writer}") as stream:
        stream.write("through a pipe")
    assert os.read(reader, 100) == b"through a pipe"
    os.close(reader), os.close(writer)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "out"):
        with pytest.raises(MplugError, match="another process writes .*out"), sole_writer(tmp_path / "out"):
            pass
        (tmp_path / "out" / "x").write_text("x")
    with sole_writer(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    with pytest.raises(ValueError), sole_writer(tmp_path / "new"):
        raise ValueError
    assert not (tmp_path / "new").exists(), "a folder with nothing in it is not left behind"


def test_where_files_can_not_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_lock", lambda handle: None)
    (tmp_path / ".a-0123abcd.new").write_text("of whom?")
    with whole_file(tmp_path / "a") as stream:
        stream.write("x")
    assert (tmp_path / ".a-0123abcd.new").exists(), "until it is old"
    os.utime(tmp_path / ".a-0123abcd.new", (0, 0))
    with whole_file(tmp_path / "a") as stream:
        stream.write("y")
    assert not (tmp_path / ".a-0123abcd.new").exists() and (tmp_path / "a").read_text() == "y"
    with sole_writer(tmp_path), pytest.raises(MplugError, match="another process"), sole_writer(tmp_path):
        pass
    (tmp_path / ".lock").write_text(f"{socket.gethostname()} {dead_process()}")
    with sole_writer(tmp_path):
        pass


def dead_process() -> int:
    """The number of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)
