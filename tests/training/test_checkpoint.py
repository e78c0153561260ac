"""Checkpoints: complete or absent, the newest and the best never removed, damage passed over or named."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from mplug_core.errors import CheckpointError, MplugError
from mplug_core.model.teacher import FeatureQueue
from mplug_core.training import checkpoint
from mplug_core.training.agreement import together
from mplug_core.training.checkpoint import (
    checkpoint_folder,
    find_fault,
    latest_checkpoint,
    load_parts,
    publish_model,
    read_meta,
    require_sound,
    save_parts,
    write_checkpoint,
)
from mplug_core.training.distributed import World
from mplug_core.weights.tensor_files import write_tensors

ALONE = World(0, 1, 0)
META = {"progress": {"total": 1}, "accumulate": 1, "pieces": 1, "recipe": {"name": "r"}, "stage": "s"}


def write(
    run: Path,
    name: str,
    keep: int = 2,
    fail: bool = False,
    best: str | None = None,
    world: World = ALONE,
    need: int = 0,
) -> Path:
    def save(folder: Path) -> None:
        file = folder / f"engine-{world.rank:05d}-of-{world.size:05d}.safetensors"
        write_tensors(file, {f"master/{name}/{world.rank}": torch.ones(50)})
        if fail:
            raise OSError(28, "No space left on device")
        if world.is_first:
            (folder / "model").mkdir()
            write_tensors(folder / "model" / "model.safetensors", {"w": torch.ones(3)})
            (folder / "model" / "README.md").write_text(name)

    return write_checkpoint(run, name, world, save, META, keep, best, need)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in checkpoint_folder(run).iterdir())


def test_round_trip(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    folder = write(tmp_path, "step-1")
    notes: list[str] = []
    assert latest_checkpoint(tmp_path, note=notes.append) == folder and notes == []
    meta = read_meta(folder)
    assert meta["world"] == 1 and meta["progress"] == {"total": 1}
    files = json.loads((folder / "manifest.json").read_text())["files"]
    here = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(files) == here - {"manifest.json"}
    assert files["model/README.md"]["size"] == 6 and len(files["meta.json"]["sha256"]) == 64


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    for k in range(1, 6):
        write(tmp_path, f"step-{k}")
    assert names(tmp_path) == ["latest", "step-4", "step-5"]


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    for k in range(1, 6):
        write(tmp_path, f"step-{k}", best="step-2" if k < 5 else "step-4")
        assert k == 5 or k < 2 or "step-2" in names(tmp_path)
    assert names(tmp_path) == ["latest", "step-4", "step-5"]
    write(tmp_path, "step-6", keep=1, best="step-4")
    assert names(tmp_path) == ["latest", "step-4", "step-6"]


def test_new_run_in_an_old_folder_keeps_its_own(tmp_path: Path) -> None:
    """A run started anew counts from 0: its checkpoints sort before the old ones, and must outlive them."""
    for k in (500, 600):
        write(tmp_path, f"step-{k}")
    write(tmp_path, "step-100")
    assert latest_checkpoint(tmp_path).name == "step-100" and "step-500" not in names(tmp_path)
    write(tmp_path, "step-200")
    assert names(tmp_path) == ["latest", "step-100", "step-200"]


def test_failure_leaves_the_last_one_standing(tmp_path: Path) -> None:
    write(tmp_path, "step-1", keep=1)
    with pytest.raises(MplugError, match="cannot save checkpoint step-2: No space left on device") as caught:
        write(tmp_path, "step-2", keep=1, fail=True)
    assert "step-1 is whole" in caught.value.hint and caught.value.exit_code == 1
    assert names(tmp_path) == ["latest", "step-1"]
    assert latest_checkpoint(tmp_path).name == "step-1"
    write(tmp_path, "step-2", keep=1)
    assert names(tmp_path) == ["latest", "step-2"]


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "step-1", keep=1)
    usage = shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: pytest.fail("written") if not k else None)
    with pytest.raises(MplugError, match=r"2,001 MB are needed, 1,000 MB are free.*step-1 is whole"):
        write(tmp_path, "step-2", keep=1, need=2 * 10**9)
    assert names(tmp_path) == ["latest", "step-1"]


def test_same_step_again(tmp_path: Path) -> None:
    write(tmp_path, "step-1")
    write(tmp_path, "step-1")
    assert names(tmp_path) == ["latest", "step-1"]


def test_leftovers_of_kills_go_with_the_next_save(tmp_path: Path) -> None:
    write(tmp_path, "step-1")
    for name in (".step-7", ".old-step-0"):
        (checkpoint_folder(tmp_path) / name / "model").mkdir(parents=True)
    for name in (".latest.new", ".latest-0123abcd.new"):
        (checkpoint_folder(tmp_path) / name).write_text("step-")
    assert latest_checkpoint(tmp_path).name == "step-1"
    write(tmp_path, "step-2")
    assert names(tmp_path) == ["latest", "step-1", "step-2"]


def test_stale_pointer_gives_way_to_the_newest(tmp_path: Path) -> None:
    for k in (1, 2):
        write(tmp_path, f"step-{k}")
    shutil.rmtree(checkpoint_folder(tmp_path) / "step-2")
    notes: list[str] = []
    assert latest_checkpoint(tmp_path, note=notes.append).name == "step-1"
    assert "names step-2, which is not there" in notes[0] and "going on from" in notes[1]
    (checkpoint_folder(tmp_path) / "latest").write_text("../../step-1")
    assert latest_checkpoint(tmp_path).name == "step-1"
    (checkpoint_folder(tmp_path) / "latest").unlink()
    assert latest_checkpoint(tmp_path).name == "step-1"


FILES = ("meta.json", "engine-00000-of-00001.safetensors", "model/model.safetensors", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", [None, b"", b"junk", "cut", "flipped"])
def test_damaged_one_is_passed_over_for_the_one_before(tmp_path: Path, file: str, content: bytes | str | None) -> None:
    for k in (1, 2):
        folder = write(tmp_path, f"step-{k}")
    damage(folder / file, content)
    notes: list[str] = []
    assert latest_checkpoint(tmp_path, note=notes.append).name == "step-1"
    assert "passing over checkpoint step-2" in notes[0] and file in notes[0]
    with pytest.raises(CheckpointError, match=rf"cannot resume .*step-2: {file}"):
        require_sound(folder, ALONE)
    damage(checkpoint_folder(tmp_path) / "step-1" / file, content)
    with pytest.raises(CheckpointError, match=r"no sound checkpoint .*step-2: .*step-1: .*--resume never") as caught:
        latest_checkpoint(tmp_path)
    assert caught.value.exit_code == 5


def damage(path: Path, content: bytes | str | None) -> None:
    old = path.read_bytes()
    if content is None:
        path.unlink()
    elif content == "cut":
        path.write_bytes(old[:-20])
    elif content == "flipped":
        middle = len(old) - 9
        path.write_bytes(old[:middle] + bytes([old[middle] ^ 1]) + old[middle + 1 :])
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["../latest", "/etc/hostname"])
def test_manifest_that_names_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, "step-1")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 6, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "a file elsewhere" in find_fault(folder, ALONE)


@pytest.mark.parametrize("file", ["state.pt", "plain.pt", "engine"])
def test_format_of_earlier_versions_is_refused(tmp_path: Path, file: str) -> None:
    folder = checkpoint_folder(tmp_path) / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text('{"progress": {}, "world": 1}')
    (folder / file).write_bytes(b"")
    (folder.parent / "latest").write_text(folder.name)
    with pytest.raises(CheckpointError, match=r"step-00000003: it is of an earlier version.*start\.model") as caught:
        latest_checkpoint(tmp_path)
    assert caught.value.exit_code == 5


def test_run_folder_is_taken_for_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path, "step-1")
    assert require_sound(tmp_path, ALONE) == require_sound(folder, ALONE) == folder
    with pytest.raises(CheckpointError, match="there is no such folder"):
        require_sound(tmp_path / "none", ALONE)


def test_published_model_is_the_checkpoints(tmp_path: Path) -> None:
    for k in (1, 2):
        publish_model(tmp_path, write(tmp_path, f"step-{k}", keep=1), ALONE)
        assert (tmp_path / "model" / "README.md").read_text() == f"step-{k}"
    inside = checkpoint_folder(tmp_path) / "step-2" / "model"
    assert (tmp_path / "model" / "model.safetensors").samefile(inside / "model.safetensors")
    (tmp_path / "model" / "README.md").write_text("my notes")
    assert find_fault(checkpoint_folder(tmp_path) / "step-2", ALONE) is None, "texts may be edited"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "model"]


def test_parts_come_back_and_unknown_ones_are_told(tmp_path: Path) -> None:
    queue, other = FeatureQueue(4, 2), FeatureQueue(4, 2)
    queue.push(torch.ones(3, 2), torch.zeros(3, 2), torch.arange(3))
    save_parts(tmp_path, {"queue": queue, "teacher": None})
    assert load_parts(tmp_path, {"queue": other, "teacher": None}) == []
    assert all(torch.equal(value, queue.state_dict()[name]) for name, value in other.state_dict().items())
    assert load_parts(tmp_path, {"teacher": torch.nn.Linear(2, 2)}) == ["teacher"]
    with pytest.raises(CheckpointError, match="queue does not fit"):
        load_parts(tmp_path, {"queue": FeatureQueue(5, 2)})


# -- two processes -----------------------------------------------------------------------------------------------------


def two(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    world, run = World(rank, 2, rank), Path(folder)
    said: list[str] = []

    def catch(work) -> None:
        try:
            work()
            said.append("nothing")
        except MplugError as error:
            said.append(f"{type(error).__name__}: {error}")

    def refuse() -> None:
        with together(world):
            if rank == 1:
                raise CheckpointError("only here", "try again")

    catch(refuse)
    catch(lambda: write(run, "step-1", world=world))
    catch(lambda: write(run, "step-2", world=world, fail=rank == 1))
    catch(lambda: write(run, "step-3", world=world, fail=rank == 0))
    said.append(str(latest_checkpoint(run, world)))
    catch(lambda: write(run, "step-4", world=world))
    torch.distributed.barrier()
    if rank == 0:
        damage(run / "checkpoints" / "step-4" / "engine-00001-of-00002.safetensors", "flipped")
    torch.distributed.barrier()
    said.append(str(latest_checkpoint(run, world)))
    (run / f"said-{rank}").write_text("\n".join(said))
    torch.distributed.destroy_process_group()


def test_an_error_of_one_process_is_an_error_of_all(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(two, (port, str(tmp_path)), nprocs=2)
    said = [(tmp_path / f"said-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0] == said[1]
    here = tmp_path / "checkpoints"
    full = "No space left on device (make room on the disk; "
    good = f"{here}/step-1 is whole, and the same command goes on from it)"
    assert said[0] == [
        "CheckpointError: only here (try again)",
        "nothing",
        f"MplugError: cannot save checkpoint step-2: {full}{good}",
        f"MplugError: cannot save checkpoint step-3: {full}{good}",
        f"{here}/step-1",
        "nothing",
        f"{here}/step-1",
    ]
    assert names(tmp_path) == ["latest", "step-1", "step-4"]


def test_sweep_takes_only_what_is_hidden(tmp_path: Path) -> None:
    write(tmp_path, "step-1")
    (checkpoint_folder(tmp_path) / "notes.txt").write_text("mine")
    checkpoint._sweep(checkpoint_folder(tmp_path))
    assert names(tmp_path) == ["latest", "notes.txt", "step-1"]
