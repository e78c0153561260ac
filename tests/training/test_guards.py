"""Guards: losses that jump, samples that fail, silence, steps that come to no number."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mplug_core.errors import DataError, MplugError
from mplug_core.model.teacher import FeatureQueue
from mplug_core.training.guards import FEW, YOUNG, LossWatch, check_budget
from mplug_core.training.step import TrainStep
from mplug_core.training.trainer import train
from tests.training.recipes import scene_recipe


def test_spike_is_told_from_noise_and_trend() -> None:
    watch = LossWatch()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator) * 0.1
    assert not any(watch.jumped(4 - step / 200 + float(noise[step])) for step in range(400))
    assert watch.jumped(9.0) and not watch.jumped(2.0) and watch.jumped(9.0)
    assert not watch.jumped(math.nan)


def test_first_steps_are_no_spikes() -> None:
    watch = LossWatch()
    assert not any(watch.jumped(10.0**step) for step in range(YOUNG))


def test_watch_goes_on_where_it_was_saved() -> None:
    whole, first = LossWatch(), LossWatch()
    for step in range(80):
        whole.jumped(1 + step % 7)
        if step < 40:
            first.jumped(1 + step % 7)
    second = LossWatch(**json.loads(json.dumps(vars(first))))
    for step in range(40, 80):
        second.jumped(1 + step % 7)
    assert second == whole


def test_budget_of_bad_images() -> None:
    check_budget(10, 50, 0.01)  # one of few images is not yet a share
    check_budget(20, 2 * FEW, 0.01)
    with pytest.raises(DataError, match="21 of 2000 images"):
        check_budget(21, 2 * FEW, 0.01)
    with pytest.raises(DataError):
        check_budget(1, 10, 0.0)


def test_stall_ends_the_process() -> None:
    program = (
        "import time\nfrom mplug_core.training.guards import StallWatch\n"
        "with StallWatch(0.4, 'what to do').watching() as watch:\n"
        "    watch.beat(6)\n"
        "    with watch.paused(): time.sleep(1)\n"
        "    watch.beat(7)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stderr == "error: no step after 7 for 0 seconds (what to do)\n"


def test_queue_takes_no_feature_that_is_no_number() -> None:
    queue = FeatureQueue(4, 2)
    queue.push(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([1, 2]))
    queue.push(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2), torch.tensor([3]))
    assert queue.ids.tolist() == [1, 2, -1, -1] and int(queue.pointer) == 2


class Poisoned:
    """Makes the loss of the steps in ``steps`` no number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        forward, self.calls = TrainStep.forward, 0

        def poisoned(module: TrainStep, *inputs: Any) -> Any:
            self.calls += 1
            loss, parts = forward(module, *inputs)
            return (loss * math.inf if self.calls in steps else loss), parts

        monkeypatch.setattr(TrainStep, "forward", poisoned)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_without_a_finite_loss_is_left_out(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    Poisoned(monkeypatch, {3 * accumulate})
    notes: list[str] = []
    train(
        scene_recipe(scenes, tmp_path / "run", f"engine.accumulate={accumulate}"),
        watch=lambda kind, figures: notes.append(figures["text"]) if kind == "note" else None,
    )
    found = lines(tmp_path / "run")
    assert [line.get("skipped_steps", 0) for line in found] == [0, 0, 1, 1, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in found if "loss" in line)
    assert any("step 3 left out" in note for note in notes)


def test_run_ends_when_no_loss_is_finite(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poisoned(monkeypatch, {5, 6, 7, 8})
    recipe = scene_recipe(scenes, tmp_path / "run", "steps=12", "run.max_skipped=3", "run.save_every=2")
    with pytest.raises(MplugError, match="3 steps in a row, the last of them 7") as caught:
        train(recipe)
    assert "step-00000006" in caught.value.hint
