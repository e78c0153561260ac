"""The time left is that of the whole run: each stage by its own steps and pace, and the evaluations to come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mplug_core.recipe import Recipe, StageSection, check_recipe
from mplug_core.training import loop
from mplug_core.training.outlook import Leg, evaluations_after, seconds_left, with_work
from mplug_core.training.trainer import train
from tests.training.recipes import scene_recipe

STAGES = [
    {"name": "see", "steps": 10, "objectives": {"patches": 1}},
    {"name": "learn", "steps": 20, "objectives": {"caption": 1, "answer": 1}},
    {"name": "polish", "steps": 30, "objectives": {"caption": 0.5, "answer": 2, "box": 0}},
    {"name": "last", "steps": 40, "objectives": {"caption": 1}, "freeze": ["visual"]},
]


def recipe(every: int = 0) -> Recipe:
    values = {
        "name": "x", "model": {"size": "tiny", "box_bins": 8}, "data": {"sources": {"a": {"path": "a"}}},
        "stages": STAGES, "run": {"evaluate_every": every},
    }  # fmt: skip
    return check_recipe(values)


def legs(first: int = 0, **work: float) -> list[Leg]:
    return [Leg(stage, stage.steps, work.get(stage.name)) for stage in recipe().stages[first:]]


def test_known_paces_are_taken() -> None:
    paces = {"see": 1.0, "learn": 2.0, "polish": 3.0, "last": 5.0}
    assert seconds_left(recipe(), legs(), 4, paces) == 6 * 1 + 20 * 2 + 30 * 3 + 40 * 5
    assert seconds_left(recipe(), legs(2), 30, paces) == 40 * 5


def test_a_stage_of_the_same_kind_is_as_fast() -> None:
    """The same losses, whatever their weights, on the same sources with the same frozen parts."""
    left = seconds_left(recipe(), legs(1), 5, {"see": 9.0, "learn": 2.0})
    assert left == 15 * 2 + 30 * 2 + 40 * 2
    left = seconds_left(recipe(), legs(2, polish=1e9, last=3e9), 0, {"learn": 7.0, "polish": 2.0})
    assert left == 30 * 2 + 40 * 2 * 3, "the last one is of another kind: three times the work"


@pytest.mark.parametrize(
    ("known", "factor"),
    [
        ({"see": 1e9, "learn": 4e9, "polish": 4e9, "last": 2e9}, (4, 4, 2)),
        ({"learn": 4e9}, (1, 1, 1)),
        ({"see": 1e9}, (1, 1, 1)),
        ({}, (1, 1, 1)),
    ],
)
def test_other_stages_by_their_work(known: dict[str, float], factor: tuple[int, int, int]) -> None:
    left = seconds_left(recipe(), legs(0, **known), 10, {"see": 0.5})
    assert left == 0.5 * (20 * factor[0] + 30 * factor[1] + 40 * factor[2])


@pytest.mark.parametrize(
    ("done", "steps", "every", "count"),
    [
        (0, 10, 0, 1), (10, 10, 0, 0), (0, 10, 4, 3), (4, 10, 4, 2), (8, 10, 4, 1), (0, 8, 4, 2), (4, 8, 4, 1),
        (8, 8, 4, 0),
    ],
)  # fmt: skip
def test_evaluations_to_come(done: int, steps: int, every: int, count: int) -> None:
    assert evaluations_after(done, steps, every) == count


def test_evaluations_take_their_time() -> None:
    paces = {"learn": 1.0, "polish": 1.0, "last": 1.0}
    # learn: at 12, 18 and 20; polish: at 6, 12, 18, 24 and 30; last: at 6, ..., 36 and 40
    assert seconds_left(recipe(6), legs(1), 10, paces, 100.0) == 10 + 30 + 40 + 100 * (3 + 5 + 7)


def test_work_is_counted_where_there_is_something_to_compare() -> None:
    counted: list[str] = []

    def count(stage: StageSection) -> float:
        counted.append(stage.name)
        return 2.0

    assert [leg.work for leg in with_work(legs(2), count)] == [2.0, 2.0] and counted == ["polish", "last"]
    assert with_work(legs(3), count)[0].work is None and len(counted) == 2


def test_a_run_tells_the_time_left_of_all_stages(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WORTH_COUNTING", 1)
    stages = [
        {"name": "one", "steps": 2, "objectives": {"caption": 1}},
        {"name": "two", "steps": 300, "objectives": {"caption": 1, "answer": 1, "statement": 1}},
    ]
    told: list[float] = []

    class Enough(Exception):
        pass

    def watch(kind: str, figures: dict[str, Any]) -> None:
        if kind == "step":
            told.append(figures["eta_seconds"] / (figures["seconds"] / figures["step"]))
        if kind == "start" and figures["stage"] == "two":
            raise Enough

    with pytest.raises(Enough):
        train(scene_recipe(scenes, tmp_path / "run", stages=stages), watch=watch)
    # in steps of the first stage; the second stage's are more work
    assert told[0] > 1.1 * 301 and told[1] > 1.1 * 300
