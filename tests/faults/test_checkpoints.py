"""Checkpoints under kills, damage, full disks and other machines: what is left goes on exactly, or says what to do."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mplug_core import atomic
from mplug_core.errors import CheckpointError, MplugError
from mplug_core.recipe import Recipe
from mplug_core.training.checkpoint import ROOM, find_fault, latest_checkpoint, sha256
from mplug_core.training.distributed import World
from mplug_core.training.loop import StageLoop
from mplug_core.training.trainer import Trainer, train
from mplug_core.weights import tensor_files
from mplug_core.weights.folder import load_model
from tests.faults.killed_saves import POINTS
from tests.training.recipes import scene_recipe
from tests.training.test_trainer import equal, launch, metrics, weights

ROOT = Path(__file__).parent.parent.parent
ALONE = World(0, 1, 0)
ENGINE = "engine-00000-of-00001.safetensors"


def recipe_of(scenes: Path, folder: Path, *overrides: str) -> Recipe:
    """Saves at steps 2, 4 and 6, and keeps one; bf16, teacher, queue, average, dropout; few losses, to be quick."""
    changes = (
        "run.save_every=2", "run.keep=1", "run.average=0.9", "engine.precision=bf16",
        "objectives={itc: 1, mlm: 1, caption: 1, patches: 1}",
        "data.sources.scenes.tasks={pretrain: 1, caption: 1, patches: 1}",
    )  # fmt: skip
    return scene_recipe(scenes, folder, *changes, *overrides)


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    train(recipe_of(scenes, folder))
    return folder


@pytest.fixture(scope="module")
def two_saves(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off after it had saved steps 2 and 4."""
    folder = tmp_path_factory.mktemp("faults") / "two"

    class Cut(Exception):
        pass

    def cut(kind: str, figures: dict[str, Any]) -> None:
        if kind == "step" and figures["step"] == 5:
            raise Cut

    with pytest.raises(Cut):
        train(recipe_of(scenes, folder, "run.keep=2"), watch=cut)
    return folder


@pytest.fixture
def run(two_saves: Path, tmp_path: Path) -> Path:
    """A copy of ``two_saves`` to damage."""
    return Path(shutil.copytree(two_saves, tmp_path / "run"))


def go_on(scenes: Path, run: Path, resume: str = "auto", *overrides: str) -> list[str]:
    """Notes of a run that goes on to its end."""
    notes: list[str] = []
    watch = lambda kind, figures: notes.append(figures["text"]) if kind == "note" else None  # noqa: E731
    train(recipe_of(scenes, run, *overrides), resume, watch)
    return notes


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def names(run: Path) -> list[str]:
    """What is in the folder of checkpoints, but for what makes temporary names differ."""
    return sorted(re.sub(r"-[0-9a-f]{8}\.new$", ".new", path.name) for path in (run / "checkpoints").iterdir())


def reseal(folder: Path, name: str) -> None:
    """Have the manifest say what a changed file now is, as a forger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were killed by SIGKILL at each point of saving step 4."""
    folder = tmp_path_factory.mktemp("killed")
    file = folder / "recipe.json"
    file.write_text(recipe_of(scenes, folder / "run").model_dump_json())
    threads = str(torch.get_num_threads())  # sums of another number of threads are others in the last digit
    command = [sys.executable, "-m", "tests.faults.killed_saves", str(file), str(folder), threads, *POINTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


LEFT = {
    "engine_files": (2, [".step-00000004", "latest", "step-00000002"]),
    "manifest": (2, [".step-00000004", "latest", "step-00000002"]),
    "rename": (2, [".step-00000004", "latest", "step-00000002"]),
    "pointer": (2, [".latest.new", "latest", "step-00000002", "step-00000004"]),
    "removing": (4, [".old-step-00000002", "latest", "step-00000004"]),
    "model_folder": (4, ["latest", "step-00000004"]),
}


@pytest.mark.parametrize("point", POINTS)
def test_kill_while_saving(scenes: Path, whole: Path, killed: Path, point: str) -> None:
    """The checkpoint is complete or absent, the model folder whole, and the run goes on to the same weights and log."""
    run, (step, left) = killed / point, LEFT[point]
    assert names(run) == left
    assert latest_checkpoint(run) == step_folder(run, step)
    load_model(str(run)), load_model(str(step_folder(run, step)))
    notes = go_on(scenes, run)
    assert any(f"step-{step:08d} at step {step}" in note for note in notes)
    assert equal(weights(run), weights(whole)) and metrics(run) == metrics(whole)
    assert names(run) == ["latest", "step-00000006"]
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_kill_before_the_last_models_place(scenes: Path, whole: Path, tmp_path: Path) -> None:
    """A run whose last checkpoint is written, and its own model folder not yet: started again it has nothing to do but
    that."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "model")
    go_on(scenes, run)
    assert equal(weights(run), weights(whole))


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 4]))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


DAMAGE = {
    "flipped byte": ("is damaged", lambda folder: flip(folder / ENGINE)),
    "flipped byte of the teacher": ("is damaged", lambda folder: flip(folder / "parts.safetensors")),
    "truncated file": ("bytes, not", lambda folder: truncate(folder / ENGINE)),
    "lost file": ("is missing", lambda folder: (folder / "random-00000.safetensors").unlink()),
    "missing manifest": ("manifest.json is missing", lambda folder: (folder / "manifest.json").unlink()),
    "half a manifest": ("manifest.json is damaged", lambda folder: os.truncate(folder / "manifest.json", 100)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_passed_over(scenes: Path, whole: Path, run: Path, kind: str) -> None:
    """With a warning, for the one before it, from which the run comes to the same end."""
    says, damage = DAMAGE[kind]
    damage(step_folder(run, 4))
    with pytest.raises(CheckpointError, match=f"cannot resume .*{says}") as caught:
        go_on(scenes, run, str(step_folder(run, 4)))
    assert caught.value.exit_code == 5
    notes = go_on(scenes, run)
    assert any("passing over checkpoint step-00000004" in note and says in note for note in notes)
    assert equal(weights(run), weights(whole)) and metrics(run) == metrics(whole)


def test_nothing_sound_left(scenes: Path, run: Path) -> None:
    for step in (2, 4):
        flip(step_folder(run, step) / ENGINE)
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"no sound checkpoint .*step-00000004.*step-00000002.*never") as caught:
        go_on(scenes, run)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == log, "nothing was started anew"


def test_stale_pointer(scenes: Path, whole: Path, run: Path) -> None:
    shutil.rmtree(step_folder(run, 4))
    notes = go_on(scenes, run)
    assert any("names step-00000004, which is not there" in note for note in notes)
    assert equal(weights(run), weights(whole))


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def pickled(place: Path, zipped: bool, bomb: Path) -> None:
    if zipped:
        torch.save(Bomb(bomb), place)
    else:
        place.write_bytes(pickle.dumps(Bomb(bomb)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name", [ENGINE, "parts.safetensors", "random-00000.safetensors", "meta.json", "manifest.json", "model/vocab.txt"]
)
def test_pickle_in_the_place_of_a_file_is_not_run(
    run: Path, scenes: Path, tmp_path: Path, name: str, zipped: bool
) -> None:
    """Not even where the manifest was made to fit it; nor is one put beside under an old name."""
    bomb = tmp_path / "exploded"
    folder = step_folder(run, 4)
    pickled(folder / name, zipped, bomb)
    pickled(folder / "state.pt", zipped, bomb)
    if name != "manifest.json":
        reseal(folder, name)
    with pytest.raises(MplugError) as caught:
        go_on(scenes, run, str(folder))
    assert caught.value.exit_code in (3, 5) and "\n" not in str(caught.value)
    assert not bomb.exists()
    pickle.loads(pickle.dumps(Bomb(bomb)))
    assert bomb.exists(), "the bomb is a real one"


CHANGES = {
    "master/model.text_projection.weight has shape": lambda t: t.update(
        {"master/model.text_projection.weight": torch.ones(3, 2)}
    ),
    "lacks exp_avg_sq/model.text_projection.weight": lambda t: t.pop("exp_avg_sq/model.text_projection.weight"),
    "holds master/model.sixth_sense": lambda t: t.update({"master/model.sixth_sense": torch.ones(2)}),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_what_does_not_fit_the_model_is_named(scenes: Path, run: Path, fault: str) -> None:
    """A sealed checkpoint whose tensors are others than the model's."""
    folder = step_folder(run, 4)
    tensors = load_file(folder / ENGINE)
    CHANGES[fault](tensors)
    save_file(tensors, folder / ENGINE)
    reseal(folder, ENGINE)
    assert find_fault(folder, ALONE) is None
    with pytest.raises(CheckpointError, match=fault) as caught:
        go_on(scenes, run)
    assert caught.value.exit_code == 5


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path, two_saves: Path, foreseen: bool) -> Iterator[Path]:
    """A file system with room for a checkpoint and a half, and what must be free beside if it is looked at before."""
    one = sum(file.stat().st_size for file in step_folder(two_saves, 4).rglob("*") if file.is_file())
    place = tmp_path / "disk"
    place.mkdir()
    size = int(1.5 * one) + (ROOM if foreseen else 0)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.strip() if done else 'no mount'}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_full_disk(
    scenes: Path, whole: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    """Seen before anything is written, or on the way: the old checkpoint stays, and with room the run goes on."""
    run = small_disk / "run"
    if not foreseen:
        plenty = shutil._ntuple_diskusage(10**15, 0, 10**15)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    with pytest.raises(MplugError, match="cannot save checkpoint step-00000004") as caught:
        go_on(scenes, run)
    assert ("MB are needed" if foreseen else os.strerror(errno.ENOSPC)) in caught.value.message
    assert "step-00000002 is whole" in caught.value.hint and "\n" not in str(caught.value)
    assert names(run) == ["latest", "step-00000002"] and latest_checkpoint(run) == step_folder(run, 2)
    load_model(str(run))
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    go_on(scenes, moved)
    assert equal(weights(moved), weights(whole)) and metrics(moved) == metrics(whole)


@pytest.mark.parametrize("file", ["engine-", "parts", "random-", "model.safetensors", "manifest.json", ".latest-"])
def test_write_that_fails(
    scenes: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Whichever file finds no room, the one before stays and is named."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(place: Path) -> None:
        fourth = "step-00000004" in str(place) or (place.name.startswith(".latest-") and step_folder(run, 4).exists())
        if fourth and file in place.name:
            raise full

    real_add, real_write, run = tensor_files.TensorFile.add, Path.write_text, tmp_path / "run"
    real_sync = atomic.sync_file

    def add(self: Any, name: str, tensor: Any) -> None:
        refuse(self.file)
        real_add(self, name, tensor)

    def write_text(self: Path, *args: Any, **kwargs: Any) -> int:
        refuse(self)
        return real_write(self, *args, **kwargs)

    def sync_file(file: Path) -> None:
        refuse(file)
        real_sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files.TensorFile, "add", add)
        patch.setattr(Path, "write_text", write_text)
        patch.setattr(atomic, "sync_file", sync_file)
        with pytest.raises(MplugError, match=r"cannot save checkpoint step-00000004.*No space left") as caught:
            go_on(scenes, run)
    assert "step-00000002 is whole" in caught.value.hint
    assert [name for name in names(run) if name.startswith(".")] == []
    assert latest_checkpoint(run) == step_folder(run, 2)
    go_on(scenes, run)
    assert equal(weights(run), weights(whole)) and metrics(run) == metrics(whole)


# -- other machines ----------------------------------------------------------------------------------------------------


def test_model_of_a_checkpoint_is_a_model(whole: Path) -> None:
    here = load_model(str(step_folder(whole, 6)))
    assert equal(here.model.state_dict(), load_model(str(whole)).model.state_dict())


def test_run_goes_on_in_another_folder(scenes: Path, whole: Path, run: Path, tmp_path: Path) -> None:
    """``--resume PATH`` from a checkpoint of another run folder."""
    go_on(scenes, tmp_path / "new", str(step_folder(run, 2)))
    assert equal(weights(tmp_path / "new"), weights(whole))
    assert names(tmp_path / "new") == ["latest", "step-00000006"]


def test_average_that_is_wanted_only_now(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins at the weights of the checkpoint, not at those of the recipe's start."""
    run = tmp_path / "run"
    go_on(scenes, run, "never", "run.average=0")
    trainer = Trainer(recipe_of(scenes, run, "run.average=0.9"), lambda kind, figures: None)
    monkeypatch.setattr(StageLoop, "run", lambda self: None)
    trainer.run()
    average = {name: value.bfloat16().float() for name, value in trainer.average.model.state_dict().items()}
    assert equal(average, {name: value.float() for name, value in weights(run).items()})


BEFORE_AND_AFTER = [
    pytest.param(("plain", 1, 1), ("deepspeed", 2, 1), id="plain to ZeRO 2", marks=pytest.mark.slow),
    pytest.param(("deepspeed", 2, 1), ("deepspeed", 3, 1), id="ZeRO 2 to ZeRO 3", marks=pytest.mark.slow),
    pytest.param(("deepspeed", 2, 2), ("deepspeed", 3, 1), id="2 processes to 1", marks=pytest.mark.slow),
    pytest.param(("deepspeed", 1, 1), ("deepspeed", 2, 2), id="1 process to 2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("before", "after"), BEFORE_AND_AFTER)
def test_goes_on_elsewhere(
    scenes: Path, tmp_path: Path, before: tuple[str, int, int], after: tuple[str, int, int]
) -> None:
    """On another engine, ZeRO stage or number of processes the losses are those of the run that nothing happened to.

    Without dropout and losses across the batch, whose values are of how it is divided.
    """
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

    def part(run: Path, engine: tuple[str, int, int], accumulate: int) -> Recipe:
        name, stage, _ = engine
        return recipe_of(
            scenes, run, "engine.precision=fp32", "model.dropout=0", "run.average=0", "run.save_every=3",
            "objectives={caption: 1, patches: 1, mlm: 1}", f"engine.name={name}", f"engine.zero_stage={stage}",
            f"engine.accumulate={accumulate}",
        )  # fmt: skip

    def trained(run: Path, engine: tuple[str, int, int], accumulate: int, stop: int = 0) -> None:
        recipe, processes = part(run, engine, accumulate), engine[2]
        if engine[0] == "plain":
            try:
                train(recipe, watch=Stop(stop))
            except MplugError as error:
                assert error.exit_code == 75
        else:
            done = launch(recipe, tmp_path / "files", processes, stop)
            assert done.returncode == 0, done.stderr[-3000:]

    lots = 2
    trained(tmp_path / "whole", before, lots // before[2])
    trained(tmp_path / "cut", before, lots // before[2], stop=3)
    trained(tmp_path / "cut", after, lots // before[2])  # what to accumulate now is worked out
    want, got = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "caption", "patches", "mlm", "lr"):
        assert [line[name] for line in got] == pytest.approx([line[name] for line in want], rel=2e-4), name
    meta = json.loads((step_folder(tmp_path / "cut", 6) / "meta.json").read_text())
    assert meta["world"] * meta["accumulate"] == lots and meta["world"] == after[2]


class Stop:
    """A watcher that asks a run to stop, as a cluster does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, kind: str, figures: dict[str, Any]) -> None:
        if kind == "step" and figures["step"] == self.step:
            os.kill(os.getpid(), 15)


def test_processes_that_cannot_share_the_batch(scenes: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplug_core.training.trainer.World.from_environment", lambda: World(0, 3, 0))
    monkeypatch.setattr("mplug_core.training.trainer.import_deepspeed", lambda: None)
    monkeypatch.setattr(World, "gather_objects", lambda self, value: [value] * 3)
    monkeypatch.setattr(World, "any", lambda self, flag: flag)
    with pytest.raises(CheckpointError, match=r"3 processes can't share .*start 1 processes"):
        train(recipe_of(scenes, run))
