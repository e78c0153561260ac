"""Checkpoints: complete or absent, the newest never removed, damage named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mplug_core.errors import CheckpointError
from mplug_core.training.checkpoint import (
    checkpoint_folder,
    latest_checkpoint,
    read_checkpoint,
    restore_random,
    write_checkpoint,
)
from mplug_core.training.distributed import World

ALONE = World(0, 1, 0)


def write(run: Path, name: str, keep: int = 2, fail: bool = False) -> Path:
    def save(folder: Path) -> None:
        (folder / "engine.pt").write_text(name)
        if fail:
            raise OSError(28, "No space left on device")

    return write_checkpoint(run, name, ALONE, save, {"x": torch.ones(2)}, {"world": 1, "name": name}, keep)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in checkpoint_folder(run).iterdir())


def test_round_trip(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    torch.manual_seed(3)
    folder = write(tmp_path, "step-1")
    want = torch.rand(4)
    assert latest_checkpoint(tmp_path) == folder
    state, meta = read_checkpoint(folder, ALONE)
    assert torch.equal(state["x"], torch.ones(2)) and meta["name"] == "step-1"
    restore_random(folder, ALONE)
    assert torch.equal(torch.rand(4), want)


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    for k in range(1, 6):
        write(tmp_path, f"step-{k}")
    assert names(tmp_path) == ["latest", "step-4", "step-5"]


def test_new_run_in_an_old_folder_keeps_its_own(tmp_path: Path) -> None:
    """A run started anew counts from 0: its checkpoints sort before the old ones, and must outlive them."""
    for k in (500, 600):
        write(tmp_path, f"step-{k}")
    write(tmp_path, "step-100")
    assert latest_checkpoint(tmp_path).name == "step-100" and "step-500" not in names(tmp_path)
    write(tmp_path, "step-200")
    assert names(tmp_path) == ["latest", "step-100", "step-200"]


def test_failure_leaves_the_last_one_standing(tmp_path: Path) -> None:
    write(tmp_path, "step-1")
    with pytest.raises(OSError):
        write(tmp_path, "step-2", fail=True)
    assert latest_checkpoint(tmp_path).name == "step-1"
    write(tmp_path, "step-2")
    assert latest_checkpoint(tmp_path).name == "step-2"


def test_same_step_again(tmp_path: Path) -> None:
    write(tmp_path, "step-1")
    write(tmp_path, "step-1")
    assert names(tmp_path) == ["latest", "step-1"]


def test_pointer_to_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path, "step-1")
    (folder / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="names step-1, which is not there"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["meta.json", "state.pt", "rng-0.pt"])
@pytest.mark.parametrize("content", [None, b"", b"junk", "cut"])
def test_damage_is_named(tmp_path: Path, file: str, content: bytes | str | None) -> None:
    folder = write(tmp_path, "step-1")
    path = folder / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if content == "cut" else content)
    with pytest.raises(CheckpointError, match="cannot read ") as caught:
        read_checkpoint(folder, ALONE)
        restore_random(folder, ALONE)
    assert caught.value.exit_code == 5


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "step-1")
    with pytest.raises(CheckpointError, match="written by 1 processes, these are 2"):
        read_checkpoint(folder, World(0, 2, 0))
