"""Runs that are killed at random moments end as if they had not been; the table's tool can tell when they don't."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.random_kills import (
    ENGINES,
    SAVES,
    STEPS,
    Moment,
    Outcome,
    faults_of,
    killed_recipe,
    moments,
    outcomes,
    unfinished_save,
)
from tests.faults.runs import Runs, differences, pointer


def test_moments_are_spread_over_the_run() -> None:
    found = moments(20, 3, 2)
    assert found == moments(20, 3, 2) != moments(20, 4, 2)
    in_steps, in_saves = ([m.step for m in found if m.saving is saving] for saving in (False, True))
    assert min(in_steps) <= 1 and max(in_steps) >= STEPS - 1 and len(set(in_steps)) >= 8
    assert set(in_saves) == set(SAVES)
    assert 3 <= sum(m.ranks is not None for m in found) <= 10 and all(m.ranks is None for m in moments(20, 3, 1))


def test_what_is_wrong_is_told() -> None:
    def outcome(codes: list[int], differs: list[str], ranks: tuple[int, ...] | None = None) -> list[str]:
        return faults_of(Outcome(Moment(1, 0.5, False, ranks), "", False, codes, "anew", differs, 1.0))

    assert outcome([-9], []) == [] == outcome([-9, 1], [], (0,))
    assert outcome([-9], ["a", "b"]) == ["2 differences, first a"]
    assert outcome([-9, 0], [], (0,)) == ["the other rank ended with [0]"]


@pytest.mark.slow
def test_differences_are_found(tmp_path: Path, scenes: Path) -> None:
    """The comparison can fail: a bit of a tensor, a line of the log, and a save that was cut off all show."""
    whole, other = tmp_path / "whole", tmp_path / "other"
    with Runs(tmp_path / "logs") as runs:
        runs.finish(killed_recipe(scenes, whole, "engine.accumulate=1", *ENGINES["plain"][1]))
    shutil.copytree(whole, other)
    assert differences(whole, other) == []
    masters = next((other / "checkpoints" / pointer(other)).glob("engine-*.safetensors"))
    tensors = load_file(masters)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    flat = tensors[name].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))
    save_file(tensors, masters)
    log = other / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 7', '"step": 8'))
    found = differences(whole, other)
    assert len(found) == 2 and found[0].endswith(name) and found[1] == "metrics.jsonl"
    assert unfinished_save(whole) == ""
    (whole / "checkpoints" / ".step-00000014").mkdir()
    assert unfinished_save(whole) == ".step-00000014"


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_twenty_kills(engine: str, tmp_path: Path) -> None:
    found = list(outcomes(engine, tmp_path, 20, seed=1))
    assert len(found) == 20 and not any(faults_of(outcome) for outcome in found), found
    assert sum(outcome.in_save for outcome in found) >= 5
    assert sum(not outcome.ended for outcome in found) >= 15
