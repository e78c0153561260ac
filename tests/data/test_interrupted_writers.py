"""Folders of scenes and packs: kills at every point of writing, leftovers, and two writers at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mplug_core import atomic
from mplug_core.atomic import sole_writer
from mplug_core.data.scenes import folder as scenes_folder
from mplug_core.data.scenes import write_scenes
from mplug_core.data.shards.pack import PackOptions, pack
from mplug_core.errors import MplugError, UsageError

CALLS = ((os, "rename"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree"), (atomic, "exchange"))
"""What changes names on the disk: a kill comes before one of these."""


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a process that dies before its ``number``-th call on the disk; whether it came to that."""
    process = os.fork()
    if process:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code in (0, 9), code
        return code == 9
    try:
        count = 0

        def spied(real: Callable) -> Callable:
            def called(*arguments, **options):
                nonlocal count
                count += 1
                if count == number:
                    os._exit(9)
                return real(*arguments, **options)

            return called

        for owner, name in CALLS:
            setattr(owner, name, spied(getattr(owner, name)))
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_each_kill(
    tmp_path: Path, begin: Callable[[Path], object], work: Callable[[Path], object]
) -> list[dict[str, bytes]]:
    """What ``out`` holds after each kill; that the same call then gives what an uninterrupted one gives is asserted."""
    begin(tmp_path / "whole" / "out")
    work(tmp_path / "whole" / "out")
    wanted, found = content(tmp_path / "whole" / "out"), []
    for number in range(1, 200):
        out = tmp_path / str(number) / "out"
        begin(out)
        if not killed_at(number, lambda out=out: work(out)):
            assert number > 3, "nothing was replaced"
            return found
        found.append(content(out))
        work(out)
        assert content(out) == wanted, f"after a kill before call {number}"
        assert [path.name for path in out.parent.iterdir()] == ["out"], "something is left"
    raise AssertionError("it never ends")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scene a split, whose picture is its seed."""

    def write_chunk(folder: Path, seed: int, *rest: object) -> dict[str, list]:
        (folder / "images" / "000000.jpg").write_text(str(seed))
        return {kind: [{"image": "images/000000.jpg", "seed": seed}] for kind in scenes_folder.KINDS}

    monkeypatch.setattr(scenes_folder, "split_sizes", lambda n: dict.fromkeys(scenes_folder.SPLITS, 1))
    monkeypatch.setattr(scenes_folder, "_write_chunk", write_chunk)


def set_up(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """``exchange``: as the system can; ``renames``: it can't exchange names; ``mount``: nor rename the folder."""
    if system != "exchange":
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    if system == "mount":
        monkeypatch.setattr(atomic, "_replaced", lambda new, folder: False)


@pytest.mark.parametrize("system", ["exchange", "renames", "mount"])
def test_scenes_survive_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: None, system: str) -> None:
    set_up(monkeypatch, system)
    write_scenes(tmp_path / "old", 1, seed=1, size=32)
    old = content(tmp_path / "old")
    found = of_each_kill(
        tmp_path,
        lambda out: shutil.copytree(tmp_path / "old", out),
        lambda out: write_scenes(out, 2, seed=2, size=32),
    )
    new = content(tmp_path / "whole" / "out")
    if system == "exchange":
        shown = [{name: data for name, data in state.items() if not name.startswith(".")} for state in found]
        assert all(state in (old, new) for state in shown)


def test_scenes_beside_what_else_is_there(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(out: Path) -> None:
        write_scenes(out, 2, seed=1, size=32)
        (out / "notes").mkdir()
        (out / "notes" / "mine.txt").write_text("mine")

    found = of_each_kill(tmp_path, begin, lambda out: write_scenes(out, 2, seed=2, size=32))
    assert all(state["notes/mine.txt"] == b"mine" for state in found)


def test_scenes_in_the_working_folder(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        write_scenes(".", 2, seed=seed, size=32)
        assert json.loads(Path("scenes.json").read_text())["seed"] == seed
    assert os.path.samefile(os.getcwd(), tmp_path)
    assert set(os.listdir()) == {"scenes.json", *scenes_folder.SPLITS}


def test_what_earlier_versions_have_left_amid_replacing_is_replaced(tmp_path: Path, few: None) -> None:
    write_scenes(tmp_path / "out", 2, seed=1, size=32)
    (tmp_path / "out" / "scenes.json").unlink()
    shutil.rmtree(tmp_path / "out" / "val")
    (tmp_path / "out" / ".building").mkdir()
    write_scenes(tmp_path / "out", 2, seed=1, size=32)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scenes.json", *scenes_folder.SPLITS}


def test_a_folder_that_only_looks_like_scenes_stays(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("mine")
    for hidden in (".building", ".ready", ".moving"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "mine.txt").write_text("mine")
        with pytest.raises(UsageError, match="holds no scenes"):
            write_scenes(tmp_path, 1)
        with pytest.raises(MplugError, match="holds other files"):
            pack(PackOptions(str(tmp_path / "train")), tmp_path, 1, force=True)
    assert set(content(tmp_path)) == {f"{name}/mine.txt" for name in ("train", ".building", ".ready", ".moving")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    source = tmp_path / "photos"
    source.mkdir()
    lines = []
    for number in range(6):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(source / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"number {number}"}))
    (source / "captions.jsonl").write_text("\n".join(lines))
    return source


@pytest.mark.parametrize(
    "system", ["exchange", *(pytest.param(system, marks=pytest.mark.slow) for system in ("renames", "mount"))]
)
def test_packs_survive_kills(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """A pack that is replaced is whole until the new one is; its own pieces are not made again."""
    set_up(monkeypatch, system)
    pack(PackOptions(str(photos), shard_size=5_000, max_samples=2), tmp_path / "old", 1)
    old = content(tmp_path / "old")
    options = PackOptions(str(photos), shard_size=5_000)
    found = of_each_kill(
        tmp_path / "runs",
        lambda out: shutil.copytree(tmp_path / "old", out),
        lambda out: pack(options, out, 1, force=True),
    )
    new = content(tmp_path / "runs" / "whole" / "out")
    assert len(new) > len(old) > 3
    if system == "exchange":
        shown = [{name: data for name, data in state.items() if not name.startswith(".")} for state in found]
        assert all(state in (old, new) for state in shown)


@pytest.mark.slow
def test_a_new_pack_goes_on_after_any_kill(tmp_path: Path, photos: Path) -> None:
    options = PackOptions(str(photos), shard_size=5_000)
    of_each_kill(tmp_path / "runs", lambda out: out.parent.mkdir(parents=True), lambda out: finished(options, out))


def finished(options: PackOptions, out: Path) -> None:
    """Pack, unless the kill came when all was done."""
    if not (out / "index.json").exists() or (out / "progress.json").exists():
        pack(options, out, 1)
    (out / ".lock").unlink(missing_ok=True)


def test_two_writers_at_once(tmp_path: Path, photos: Path, few: None) -> None:
    for name, work in (
        ("scenes", lambda out: write_scenes(out, 2, size=32)),
        ("pack", lambda out: pack(PackOptions(str(photos)), out, 1)),
    ):
        with sole_writer(tmp_path / name), pytest.raises(MplugError, match="another process writes") as caught:
            work(tmp_path / name)
        assert len(str(caught.value)) < 300
        work(tmp_path / name)
        assert not [path for path in (tmp_path / name).iterdir() if path.name.startswith(".")]


def test_what_is_packed_is_not_replaced(tmp_path: Path, photos: Path) -> None:
    options = PackOptions(str(photos))
    pack(options, tmp_path / "pack", 1)
    before = content(tmp_path / "pack")
    (tmp_path / "link").symlink_to(tmp_path / "pack")
    for source in (tmp_path / "pack", tmp_path / "link", tmp_path / "pack" / "00000.tar"):
        with pytest.raises(UsageError, match="which is replaced"):
            pack(PackOptions(str(source)), tmp_path / "pack", 1, force=True)
    assert content(tmp_path / "pack") == before


@pytest.mark.parametrize("place", ["x" * 300, "file/out", "/proc/none"])
def test_places_that_can_not_be_written(tmp_path: Path, photos: Path, few: None, place: str) -> None:
    (tmp_path / "file").write_text("")
    for work in (lambda out: write_scenes(out, 2, size=32), lambda out: pack(PackOptions(str(photos)), out, 1)):
        with pytest.raises(MplugError) as caught:
            work(tmp_path / place)
        assert len(str(caught.value)) < 300
