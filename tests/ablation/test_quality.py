"""Networks trained alike: what is shared, what is each one's own, and how curves are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mplug_core.ablation.quality import Experiment, at_step, qualities
from mplug_core.ablation.variants import chosen
from mplug_core.errors import DataError, RecipeError
from mplug_core.training.history import Curve
from mplug_core.weights.folder import load_model
from tests.training.recipes import scene_recipe

STAGES = [
    {"name": "see", "steps": 2, "objectives": {"patches": 1}},
    {"name": "learn", "steps": 4, "objectives": {"itm": 1, "answer": 1}, "freeze": ["visual"]},
]


def experiment(scenes: Path, folder: Path, *overrides: str) -> Experiment:
    recipe = scene_recipe(
        scenes, folder / "unused", "run.evaluate_every=2",
        "data.sources.scenes.tasks={pretrain: 1, vqa: 1, patches: 1}",
        *overrides, stages=STAGES, teacher={"alpha": 0, "queue_size": 0},
        evaluate={"val": {"path": str(scenes), "split": "val", "tasks": ["vqa"], "limit": 4}},
    )  # fmt: skip
    return Experiment(recipe, folder)


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    made = experiment(scenes, tmp_path_factory.mktemp("fusion"))
    made.train(chosen(["connected", "skip6-paper", "asymmetric"]), lambda kind, figures: None)
    return made


def test_equal_networks_are_trained_once(trained: Experiment) -> None:
    assert sorted(path.name for path in trained.folder.glob("[!.]*")) == [
        "aa-seed0", "features", "jj-seed0", "run.json", "shared",
    ]  # fmt: skip


def test_each_has_its_fusion_and_the_shared_visual_encoder(trained: Experiment) -> None:
    shared = load_model(str(trained.folder / "shared" / "model")).model
    for name, fusion in (("jj", "connected"), ("aa", "asymmetric")):
        own = load_model(str(trained.folder / f"{name}-seed0" / "model")).model
        assert own.config.fusion == fusion
        for key, weight in shared.visual.state_dict().items():
            assert torch.equal(weight, own.visual.state_dict()[key]), key
        assert not torch.equal(shared.text.layers[0].attention.qkv.weight, own.text.layers[0].attention.qkv.weight)


def test_visual_features_are_computed_once(trained: Experiment) -> None:
    own = trained.folder / "jj-seed0" / "features"
    assert own.is_symlink() and own.resolve() == (trained.folder / "features").resolve()
    views = 40
    assert sum(len(np.load(index)) for index in own.glob("*/*.index.npy")) == views


def test_curves_of_all(trained: Experiment) -> None:
    curves = trained.curves(chosen(["connected", "asymmetric"]))
    assert curves["asymmetric"]["val/vqa/accuracy"][0].steps == [2, 4]


def test_what_is_there_is_not_trained_again(trained: Experiment) -> None:
    seen: list[str] = []
    trained.train(chosen(["connected"]), lambda kind, figures: seen.append(kind))
    assert "step" not in seen


def test_steps_take_turns(trained: Experiment) -> None:
    found = trained.step_seconds(chosen(["connected", "asymmetric"]), repeats=2)
    assert set(found) == {"connected", "asymmetric"} and all(t.median > 0 for t in found.values())


def test_what_can_not_be_compared(scenes: Path, tmp_path: Path) -> None:
    for override, fault in (
        ("stages=[{name: all, steps: 2}]", "too few stages"),
        ("evaluate={}", "evaluates nothing"),
        ("model.fusion=none", "no fusion layers"),
    ):
        with pytest.raises(RecipeError, match=fault):
            experiment(scenes, tmp_path, override, *(["objectives={answer: 1}"] if "none" in override else []))
    with pytest.raises(DataError, match="no evaluations of connected"):
        experiment(scenes, tmp_path).curves(chosen(["connected"]))


def test_between_two_evaluations_in_proportion() -> None:
    curve = Curve([10, 20], [0.2, 0.6])
    assert [at_step(curve, step) for step in (5, 10, 15, 20, 30)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])


def test_equal_time_is_that_of_the_fastest() -> None:
    curves = {
        "slow": {"m": [Curve([10, 20], [0.2, 0.6]), Curve([10, 20], [0.2, 0.8])]},
        "fast": {"m": [Curve([10, 20], [0.1, 0.5])] * 2},
    }
    found = qualities(curves, {"slow": 2.0, "fast": 1.0}, "m")
    assert found["fast"].equal_time == pytest.approx(0.5) and found["fast"].steps_in_time == 20
    assert found["slow"].equal_steps == pytest.approx(0.7) and found["slow"].spread == pytest.approx(0.2)
    # half as many steps in the time
    assert found["slow"].steps_in_time == 10 and found["slow"].equal_time == pytest.approx(0.2)
