"""Faults of training runs, each a real one: what is said, the exit code, what is left, and that the run can go on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mplug_core.recipe import Recipe
from tests.faults.random_kills import logged_steps, unfinished_save, until
from tests.faults.runs import (
    BOUND,
    LAUNCHED,
    ROOT,
    Run,
    Runs,
    checkpoints,
    differences,
    final_tensors,
    metrics,
    pointer,
    steps,
)
from tests.training.recipes import scene_recipe

ZERO = ("engine.name=deepspeed", "engine.zero_stage=2")
STAGES = [pytest.param(2, id="zero2"), pytest.param(3, id="zero3")]


def quick_recipe(scenes: Path, folder: Path, *overrides: str) -> Recipe:
    """Six steps of three losses, with dropout, teacher, queue and average; saved after 2, 4 and 6, evaluated after 3
    and 6."""
    evaluate = {"val": {"path": str(scenes), "split": "train", "tasks": ["grounding"], "limit": 2}}
    settings = (
        "data.sources.scenes.tasks={pretrain: 1}", "objectives={itc: 1, itm: 1, prefix_lm: 1}", "run.average=0.9",
        "data.sources.scenes.batch_size=4", "run.save_every=2", "run.evaluate_every=3",
    )  # fmt: skip
    return scene_recipe(scenes, folder, *settings, *overrides, evaluate=evaluate)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    if not hasattr(os, "fork"):
        pytest.skip("runs are forked")
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    with Runs(tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def whole(runs: Runs, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    runs.finish(quick_recipe(scenes, folder))
    return folder


@pytest.fixture(scope="module")
def whole_of_two(runs: Runs, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "whole-of-two"
    runs.finish(quick_recipe(scenes, folder, *ZERO), 2)
    return folder


def at_step(run: Run, folder: Path, step: int) -> None:
    assert until(run, lambda: logged_steps(folder) >= step), run.said()[-2000:]


def in_slow_step(run: Run, fault: dict[str, Any]) -> None:
    """Wait until the ranks of a run are in the step that is slow for the test's sake."""
    mark = Path(fault["mark"])
    assert until(run, mark.exists), run.said()[-2000:]
    mark.unlink()


def skipped(folder: Path) -> list[int]:
    return [line.get("skipped_steps", 0) for line in steps(folder)]


def is_finite(folder: Path) -> bool:
    tensors = final_tensors(folder).values()
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())


def slow(folder: Path, call: int, seconds: float) -> dict[str, Any]:
    """The fault that gives a test the time to do something during a step of the first rank."""
    mark = str(folder.with_suffix(".slow"))
    return {"fault": "slow_step", "call": call, "seconds": seconds, "mark": mark, "ranks": [0]}


# -- losses and gradients that are no number ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_step_that_is_no_number_is_left_out(runs: Runs, scenes: Path, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "run"
    run = runs.finish(quick_recipe(scenes, folder), faults=[{"fault": "no_number", "calls": [3], "where": where}])
    assert skipped(folder) == [0, 0, 1, 1, 1, 1]
    assert run.said().count("step 3 left out: its loss or gradient is not finite") == 1
    assert all(math.isfinite(line["loss"]) for line in steps(folder) if "loss" in line)
    assert is_finite(folder)


@pytest.mark.slow
def test_run_that_comes_to_no_number_any_more_names_its_last_checkpoint(
    runs: Runs, scenes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    recipe = quick_recipe(scenes, folder, "run.max_skipped=3")
    run = runs.start(recipe, faults=[{"fault": "no_number", "calls": [3, 4, 5, 6]}])
    assert run.wait() == [1]
    (error,) = run.errors()
    assert "the loss is not finite: 3 steps in a row, the last of them 5" in error
    assert f"the last good checkpoint is {folder / 'checkpoints' / 'step-00000004'}" in error
    runs.finish(recipe)
    assert skipped(folder) == [0, 0, 1, 2, 2, 2] and is_finite(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "where", "ranks"),
    [(2, "loss", [0, 1]), (2, "loss", [1]), (3, "gradient", [1]), (0, "gradient", [1])],
)  # fmt: skip
def test_no_number_on_some_ranks_leaves_the_step_out_on_all(
    runs: Runs, scenes: Path, tmp_path: Path, stage: int, where: str, ranks: list[int]
) -> None:
    folder = tmp_path / "run"
    recipe = quick_recipe(scenes, folder, *ZERO, f"engine.zero_stage={stage}", "steps=4")
    faults = [
        {"fault": "no_number", "calls": [2], "where": where, "ranks": ranks},
        {"fault": "leave_digest", "file": str(tmp_path / "digest.x")},
    ]
    runs.finish(recipe, 2, faults=faults)
    assert skipped(folder) == [0, 1, 1, 1]
    assert is_finite(folder)
    assert len({(tmp_path / f"digest.{rank}").read_text() for rank in (0, 1)}) == 1


@pytest.mark.slow
def test_two_ranks_that_come_to_no_number_end_together(runs: Runs, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    faults = [{"fault": "no_number", "calls": [3, 4, 5], "ranks": [1]}]
    run = runs.start(quick_recipe(scenes, folder, *ZERO, "run.max_skipped=3"), 2, faults=faults)
    assert run.wait() == [1, 1]
    assert "step-00000004" in run.errors(0)[0] and "3 steps in a row, the last of them 5" in run.errors(1)[0]


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_signal_saves_and_the_run_goes_on(
    runs: Runs, scenes: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    pause = slow(folder, 3, 1.0)
    run = runs.start(quick_recipe(scenes, folder), faults=[pause])
    in_slow_step(run, pause)
    run.send(number)
    assert run.wait() == [75]
    assert run.errors() == [f"error: stopped at step 3, saved in {folder} (run it again to go on)"]
    assert pointer(folder) == "step-00000003" and not unfinished_save(folder)
    runs.finish(quick_recipe(scenes, folder))
    assert differences(whole, folder) == []


@pytest.mark.slow
def test_second_signal_ends_at_once(runs: Runs, scenes: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pause = slow(folder, 3, 100.0)
    run = runs.start(quick_recipe(scenes, folder), faults=[pause])
    in_slow_step(run, pause)
    run.send(signal.SIGTERM)
    time.sleep(1.3)  # what comes within a second is the same wish, handed on
    run.send(signal.SIGTERM)
    assert run.wait(30.0) == [130]
    assert pointer(folder) == "step-00000002"
    runs.finish(quick_recipe(scenes, folder))
    assert differences(whole, folder) == []


@pytest.mark.slow
def test_stopped_before_an_evaluation_and_killed_after_it(
    runs: Runs, scenes: Path, whole: Path, tmp_path: Path
) -> None:
    """The checkpoint and the evaluation are of the same step: its line is not kept, since it comes again."""
    folder = tmp_path / "run"
    pause = slow(folder, 3, 1.0)
    run = runs.start(quick_recipe(scenes, folder), faults=[pause])
    in_slow_step(run, pause)
    run.send(signal.SIGTERM)
    assert run.wait() == [75] and not any("evaluation" in line for line in metrics(folder))
    run = runs.start(
        quick_recipe(scenes, folder), faults=[{"fault": "slow_end_of_evaluation", "call": 1, "seconds": 100.0}]
    )
    assert until(run, lambda: '"evaluation"' in (folder / "metrics.jsonl").read_text())
    run.kill()
    assert run.wait() == [-9]
    runs.finish(quick_recipe(scenes, folder))
    assert differences(whole, folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, [1]), (signal.SIGUSR1, [0, 1])])
def test_signal_to_ranks_saves_on_all(
    runs: Runs, scenes: Path, whole_of_two: Path, tmp_path: Path, number: int, ranks: list[int]
) -> None:
    folder = tmp_path / "run"
    pause = slow(folder, 3, 1.0)
    run = runs.start(quick_recipe(scenes, folder, *ZERO), 2, faults=[pause])
    in_slow_step(run, pause)
    run.send(number, ranks)
    assert run.wait() == [75, 75]
    assert len(run.errors(0)) == 1 and run.errors(1) == []
    runs.finish(quick_recipe(scenes, folder, *ZERO), 2)
    assert differences(whole_of_two, folder) == []


@pytest.mark.slow
def test_second_signal_to_ranks(runs: Runs, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pause = slow(folder, 3, 100.0)
    run = runs.start(quick_recipe(scenes, folder, *ZERO), 2, faults=[pause])
    in_slow_step(run, pause)
    time.sleep(0.5)  # the other one too
    run.send(signal.SIGINT)
    time.sleep(1.3)
    run.send(signal.SIGINT)
    codes = run.wait(30.0)
    assert codes[0] == 130 and codes[1] in (130, 1)  # the second one waits for the first, and may hear of its end first
    assert pointer(folder) == "step-00000002"


def launched(recipe: Recipe, folder: Path) -> subprocess.Popen[str]:
    """``mplug pretrain --devices 2`` as the head of a process group."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(recipe.model_dump_json(), encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    command = [sys.executable, "-m", "mplug_cli.app", "pretrain", "--recipe", str(file), "--devices", "2"]
    return subprocess.Popen(
        command, cwd=ROOT, env=clean, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ended(launcher: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr; whatever happens, nothing of its group is left."""
    try:
        said = launcher.communicate(timeout=BOUND)[1]
        with pytest.raises(ProcessLookupError):  # nobody of the group is left
            os.killpg(launcher.pid, 0)
        return launcher.returncode, said
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.communicate(timeout=30)


def launched_to_step(recipe: Recipe, tmp_path: Path, step: int) -> subprocess.Popen[str]:
    launcher = launched(recipe, tmp_path / "files")
    folder = Path(str(recipe.run.folder))
    began = time.monotonic()
    while logged_steps(folder) < step and launcher.poll() is None and time.monotonic() < began + BOUND:
        time.sleep(0.02)
    return launcher


@pytest.mark.slow
def test_interrupt_from_a_terminal_with_two_devices(runs: Runs, scenes: Path, tmp_path: Path) -> None:
    """A terminal signals the launcher and its ranks, and the launcher hands it on: one wish, saved once."""
    folder = tmp_path / "run"
    recipe = quick_recipe(scenes, folder, *ZERO, "steps=200", "run.save_every=100", "run.evaluate_every=0")
    launcher = launched_to_step(recipe, tmp_path, 2)
    os.killpg(launcher.pid, signal.SIGINT)
    code, said = ended(launcher)
    assert code == 75, said[-2000:]
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        f"error: stopped at step {logged_steps(folder)}, saved in {folder} (run it again to go on)"
    ]
    assert not unfinished_save(folder)
    again = runs.start(recipe, 2)
    at_step(again, folder, logged_steps(folder) + 1)
    assert "resumed" in again.said()
    again.kill()
    assert again.wait() == [-9, -9]


@pytest.mark.slow
def test_rank_that_is_killed_ends_the_command(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = quick_recipe(scenes, folder, *ZERO, "steps=200", "run.save_every=2", "run.evaluate_every=0")
    launcher = launched_to_step(recipe, tmp_path, 3)
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True, timeout=20
    )
    ranks = [int(pid) for pid in found.stdout.split()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, said = ended(launcher)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) in ((137, 1), (1, 1)), said[-2000:]
    assert "another process of the run has ended" in errors[0] and "the last good checkpoint is" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_is_killed_ends_the_other(
    runs: Runs, scenes: Path, whole_of_two: Path, tmp_path: Path, rank: int
) -> None:
    folder = tmp_path / "run"
    pause = slow(folder, 4, 1.0)
    run = runs.start(quick_recipe(scenes, folder, *ZERO), 2, faults=[pause])
    in_slow_step(run, pause)
    run.kill([rank])
    codes, other = run.wait(60.0), 1 - rank
    assert (codes[rank], codes[other]) == (-9, 1)
    (error,) = run.errors(other)
    assert "another process of the run has ended" in error and "step-00000002" in error
    runs.finish(quick_recipe(scenes, folder, *ZERO), 2)
    assert differences(whole_of_two, folder) == []


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB of its own; skips where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True, timeout=20
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True, timeout=20)


def test_disk_without_room_for_a_checkpoint(runs: Runs, scenes: Path, whole: Path, small_disk: Path) -> None:
    folder = small_disk / "run"
    pause = slow(folder, 3, 1.0)
    run = runs.start(quick_recipe(scenes, folder), faults=[pause])
    in_slow_step(run, pause)
    other = small_disk / "other"
    other.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 100_000))
    assert run.wait() == [1]
    (error,) = run.errors()
    assert "step-00000004: " in error or "cannot write" in error, error
    assert pointer(folder) == "step-00000002" and not unfinished_save(folder)
    again = runs.start(quick_recipe(scenes, folder))  # still no room
    assert again.wait() == [1] and len(again.errors()) == 1
    assert pointer(folder) == "step-00000002"
    other.unlink()
    runs.finish(quick_recipe(scenes, folder))
    assert differences(whole, folder) == []


@pytest.mark.slow
def test_write_that_fails_half_way(runs: Runs, scenes: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = runs.start(quick_recipe(scenes, folder), faults=[{"fault": "small_files", "save": 2, "size": 40_000}])
    assert run.wait() == [1]
    (error,) = run.errors()
    assert "cannot save checkpoint step-00000004: " in error and "step-00000002 is whole" in error
    assert checkpoints(folder) == ["step-00000002"] and not unfinished_save(folder)
    runs.finish(quick_recipe(scenes, folder))
    assert differences(whole, folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_write_that_fails_on_one_rank(runs: Runs, scenes: Path, whole_of_two: Path, tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "run"
    faults = [{"fault": "small_files", "save": 2, "size": 40_000, "ranks": [rank]}]
    run = runs.start(quick_recipe(scenes, folder, *ZERO), 2, faults=faults)
    assert run.wait() == [1, 1]
    assert all("cannot save checkpoint step-00000004: " in run.errors(rank)[0] for rank in (0, 1))
    assert checkpoints(folder) == ["step-00000002"] and not unfinished_save(folder)
    runs.finish(quick_recipe(scenes, folder, *ZERO), 2)
    assert differences(whole_of_two, folder) == []


def test_log_that_takes_no_lines(runs: Runs, scenes: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pause = slow(folder, 3, 1.0)
    run = runs.start(quick_recipe(scenes, folder), faults=[pause])
    in_slow_step(run, pause)
    log = folder / "metrics.jsonl"
    log.rename(tmp_path / "log")
    log.mkdir()  # which nobody can append to, whoever runs the tests
    assert run.wait() == [0]
    assert "metrics.jsonl can't be written: Is a directory" in run.said()
    log.rmdir()
    (tmp_path / "log").rename(log)
    assert differences(whole, folder) == ["metrics.jsonl"]


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "images"),
    [
        (("data.sources.scenes.batch_size=1", "steps=3"), 3),  # no negatives for ITM
        pytest.param(
            ("data.sources.scenes.batch_size=12", "steps=4"), 48, marks=pytest.mark.slow
        ),  # the last batch of an epoch goes on in the next
        pytest.param(  # more than there are
            ("data.sources.scenes.limit=3", "data.sources.scenes.batch_size=8", "steps=3"), 24, marks=pytest.mark.slow
        ),
    ],
)
def test_odd_batches(runs: Runs, scenes: Path, tmp_path: Path, settings: tuple[str, ...], images: int) -> None:
    folder = tmp_path / "run"
    runs.finish(quick_recipe(scenes, folder, *settings))
    meta = json.loads((folder / "checkpoints" / pointer(folder) / "meta.json").read_text())
    assert meta["progress"]["images"] == images
    assert not any(skipped(folder)) and is_finite(folder)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps(folder))


@pytest.mark.parametrize(
    ("kind", "words"),
    [("killed", "has died"), pytest.param("hangs", "gave nothing for 3 seconds", marks=pytest.mark.slow)],
)
def test_worker_that_is_lost(runs: Runs, scenes: Path, whole: Path, tmp_path: Path, kind: str, words: str) -> None:
    folder = tmp_path / "run"
    recipe = quick_recipe(scenes, folder, "data.workers=2", "run.stall_seconds=3")
    run = runs.start(recipe, faults=[{"fault": "bad_worker", "lot": 3, "kind": kind}])
    assert run.wait() == [3]
    (error,) = run.errors()
    assert (
        words in error and "run it again to go on" in error
    )  # a death is noticed anywhere: what was saved is what was due
    with pytest.raises(ProcessLookupError):  # no worker is left either
        os.killpg(run.pids[0], 0)
    runs.finish(recipe)
    assert differences(whole, folder) == []


@pytest.mark.slow
def test_worker_of_one_rank_that_is_lost(runs: Runs, scenes: Path, whole_of_two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = quick_recipe(scenes, folder, *ZERO, "data.workers=1")
    run = runs.start(recipe, 2, faults=[{"fault": "bad_worker", "lot": 3, "kind": "killed", "ranks": [1]}])
    codes = run.wait()
    assert codes[1] == 3 and codes[0] in (1, 3), codes
    assert "a worker of the data loader has died" in run.errors(1)[0] and len(run.errors(0)) == 1
    runs.finish(recipe, 2)
    assert differences(whole_of_two, folder) == []


@pytest.mark.slow
def test_step_that_never_ends(runs: Runs, scenes: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = quick_recipe(scenes, folder, "run.stall_seconds=3")
    run = runs.start(recipe, faults=[slow(folder, 4, 100.0)])
    assert run.wait(60.0) == [1]
    assert run.errors() == ["error: no step after 3 for 3 seconds (run it again to go on from the last checkpoint)"]
    runs.finish(recipe)
    assert differences(whole, folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "settings", "words"),
    [
        (0.6, ("data.max_bad_fraction=0",), "images can't be read, more than 0.00%"),
        (1.0, (), "images can't be read, more than 1.00%"),
    ],
)
def test_images_that_become_unreadable(
    runs: Runs, scenes: Path, whole: Path, tmp_path: Path, share: float, settings: tuple[str, ...], words: str
) -> None:
    """A disk that fails during a run: saved, and when it is repaired the run goes on as if nothing had been."""
    shutil.copytree(scenes, tmp_path / "scenes")
    folder, recipe = tmp_path / "run", quick_recipe(tmp_path / "scenes", tmp_path / "run", *settings)
    pause = slow(folder, 3, 1.0)
    run = runs.start(recipe, faults=[pause])
    in_slow_step(run, pause)
    files = sorted((tmp_path / "scenes" / "train" / "images").iterdir())[4:]  # not those that are evaluated
    kept = {file: file.read_bytes() for file in files[: int(share * len(files))]}
    assert len(kept) >= 20
    for file in kept:
        file.write_bytes(b"not an image")
    assert run.wait() == [3]
    assert words in run.errors()[-1] and len(run.errors()) == 1
    assert pointer(folder) == f"step-{logged_steps(folder):08d}"  # though it was not due
    for file, content in kept.items():
        file.write_bytes(content)
    runs.finish(recipe)
    assert differences(whole, folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_task_that_one_rank_has_no_records_of(runs: Runs, scenes: Path, tmp_path: Path, stage: int) -> None:
    """It still runs the task's modules, without weight, or ranks would wait for each other's gradients and weights."""
    folder = tmp_path / "run"
    settings = ("data.sources.scenes.tasks={pretrain: 1, vqa: 1}", "objectives.answer=1", f"engine.zero_stage={stage}")
    faults = [
        {"fault": "without_records", "task": "vqa", "lots": [1, 3], "ranks": [1]},
        {"fault": "without_records", "task": "vqa", "lots": [2, 3], "ranks": [0]},
        {"fault": "leave_digest", "file": str(tmp_path / "digest.x")},
    ]
    runs.finish(quick_recipe(scenes, folder, *ZERO, *settings), 2, faults=faults)
    lines = steps(folder)
    assert not any(line.get("left_out_blocks", 0) for line in lines)
    assert ["answer" in line for line in lines] == [True, True, True, False, True, True]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert len({(tmp_path / f"digest.{rank}").read_text() for rank in (0, 1)}) == 1


# -- others ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_that_raises(runs: Runs, scenes: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = runs.start(quick_recipe(scenes, folder), faults=[{"fault": "failing_evaluation", "call": 1}])
    assert run.wait() == [1]
    assert "ZeroDivisionError: no caption has a word" in run.errors()[0] and "Traceback" not in run.said()
    assert pointer(folder) == "step-00000002"
    runs.finish(quick_recipe(scenes, folder))
    assert differences(whole, folder) == []


@pytest.mark.slow
def test_evaluation_that_raises_ends_both_ranks(runs: Runs, scenes: Path, whole_of_two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = quick_recipe(scenes, folder, *ZERO)
    run = runs.start(recipe, 2, faults=[{"fault": "failing_evaluation", "call": 1, "ranks": [0]}])
    assert run.wait() == [1, 1]
    assert "no caption has a word" in run.errors(0)[0]
    assert "the evaluation failed on the first process" in run.errors(1)[0]
    runs.finish(recipe, 2)
    assert differences(whole_of_two, folder) == []


def test_tracker_that_is_lost(runs: Runs, scenes: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = runs.finish(quick_recipe(scenes, folder), faults=[{"fault": "lost_tracker"}])
    assert run.said().count("the server of figures is gone") == 1
    assert differences(whole, folder) == []


@pytest.mark.slow
def test_other_numbers_of_processes_in_turn(runs: Runs, scenes: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 2 processes learn what 2 do, as the global batch stays; without what depends on the number: dropout,
    which is drawn by each process, and ITC, which compares within what is there at once."""
    settings = (*ZERO, "model.dropout=0", "objectives={prefix_lm: 1, mlm: 1, itc: 0, itm: 0}", "steps=9")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    runs.finish(quick_recipe(scenes, whole, *settings), 2)
    for processes in (2, 1):
        pause = slow(folder, 3, 1.0)
        run = runs.start(quick_recipe(scenes, folder, *settings), processes, faults=[pause])
        in_slow_step(run, pause)
        run.send(signal.SIGTERM)
        assert run.wait() == [75] * processes, run.said()[-2000:]
    runs.finish(quick_recipe(scenes, folder, *settings), 2)
    want, got = steps(whole), steps(folder)
    assert [line["step"] for line in got] == list(range(1, 10))
    for name in ("loss", "prefix_lm", "mlm", "grad_norm"):
        assert [line[name] for line in got] == pytest.approx([line[name] for line in want], rel=1e-4), name
    tensors, others = final_tensors(whole), final_tensors(folder)
    masters = [name for name in tensors if "engine" in name and tensors[name].is_floating_point()]
    assert masters and all(torch.allclose(tensors[name], others[name], atol=1e-4) for name in masters)
