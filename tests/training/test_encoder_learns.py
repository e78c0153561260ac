"""A convolutional encoder with batch norms learns under every engine and precision, stage by stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mplug_core.errors import CheckpointError
from mplug_core.model.vision import VisualEncoder
from mplug_core.training import precision, preflight
from mplug_core.training.flops import StepFlops
from mplug_core.training.preflight import check_run
from mplug_core.training.trainer import train
from mplug_core.weights.tensor_files import read_tensors
from tests.training.recipes import scene_recipe

NORMED = {
    "backbone": "resnet10t", "image_size": 64, "levels": [1, 2], "subcells": 2, "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5], "options": {"channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 8},
}  # fmt: skip
ENGINES = [("plain", 1), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
ONLY = ("data.sources.scenes.tasks={caption: 1, vqa: 1, grounding: 1}", "objectives={caption: 1, answer: 1, box: 1}",
        "teacher={alpha: 0, queue_size: 0}")  # fmt: skip


def visual_change(folder: Path, before: Path) -> dict[str, float]:
    """How far each part of the backbone has moved between two model folders."""
    first, last = (dict(read_tensors(path / "model.safetensors")) for path in (before, folder))
    moved: dict[str, float] = {}
    for name, value in last.items():
        if name.startswith("visual.backbone."):
            part = name.split(".")[2]
            moved[part] = moved.get(part, 0.0) + float((value.float() - first[name].float()).abs().sum())
    return moved


def stages_run(scenes: Path, folder: Path, engine: str, zero: int, kind: str, *overrides: str) -> Path:
    recipe = scene_recipe(
        scenes, folder, *ONLY, "model.vision.options={}", f"engine.zero_stage={zero}", *overrides,
        engine={"name": engine, "precision": kind},
        stages=[
            {"name": "frozen", "steps": 2, "pool": 2, "freeze": ["visual"]},
            {"name": "learn", "steps": 2, "pool": 2, "freeze": ["stem"], "lr": 1e-2},
            {"name": "fine", "steps": 2, "freeze": ["stem"], "lr": 1e-2},
        ],
    )  # fmt: skip
    values = recipe.model_copy(deep=True)
    values.model.vision = type(values.model.vision)(**NORMED)
    values.data.sources["scenes"].cached_views = 1
    return train(values, "never")


def run_of(scenes: Path, folder: Path, engine: str, zero: int, kind: str) -> dict[str, float]:
    stages_run(scenes, folder, engine, zero, kind, "run.save_every=2", "run.keep=9")
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    return visual_change(folder / "model", checkpoints[0] / "model")


@pytest.mark.parametrize(
    ("engine", "zero"), [("plain", 1), pytest.param("deepspeed", 1, marks=pytest.mark.slow)]
)
def test_all_but_the_stem_learns(scenes: Path, tmp_path: Path, engine: str, zero: int) -> None:
    moved = run_of(scenes, tmp_path / "run", engine, zero, "fp32")
    assert moved["conv1"] == 0 and moved["layer4"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "zero"), ENGINES)
def test_all_but_the_stem_learns_in_bf16(scenes: Path, tmp_path: Path, engine: str, zero: int) -> None:
    moved = run_of(scenes, tmp_path / "run", engine, zero, "bf16")
    assert moved["conv1"] == 0 and moved["layer4"] > 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "step_flops", lambda *given, **named: StepFlops(1, {"forward": 1.0}))
    monkeypatch.setattr(preflight._Check, "_memory", lambda *given: [])


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_preflight_sees_what_this_machine_cannot_compute(
    scenes: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    compute = VisualEncoder.forward

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no such kernel")

    def refusing(self, pixels):
        if pixels.dtype == torch.bfloat16 and part == "forward":
            raise RuntimeError("expected scalar type BFloat16 but found Float")
        return Refused.apply(compute(self, pixels)) if pixels.dtype == torch.bfloat16 else compute(self, pixels)

    monkeypatch.setattr(VisualEncoder, "forward", refusing)
    for kind, frozen, found in (("bf16", "[]", True), ("bf16", "[visual]", part == "forward"), ("fp32", "[]", False)):
        recipe = scene_recipe(scenes, tmp_path, *ONLY, f"engine.precision={kind}", f"freeze={frozen}")
        faults = [fault for fault in check_run(recipe).faults if "can't be computed in bf16" in fault.message]
        assert bool(faults) == found, (kind, frozen)
        assert all(fault.exit_code == 3 and "engine.precision=fp32" in str(fault) for fault in faults)


def test_a_failure_while_computing_is_not_said_to_be_of_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.small import small_config

    encoder = VisualEncoder(small_config(vision=NORMED))

    def fails(*given, **named):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(encoder.backbone, "forward_intermediates", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        encoder(torch.zeros(1, 3, 64, 64))
    with pytest.raises(CheckpointError, match="levels"):
        VisualEncoder(small_config(vision={**NORMED, "levels": [9]}))


def test_vision_transformers_and_fp32_need_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.small import small_config
    from tests.training.recipes import check_recipe

    monkeypatch.setattr(VisualEncoder, "forward", lambda *given: pytest.fail("computed"))
    engine = check_recipe({"name": "x", "engine": {"name": "plain", "precision": "bf16"}}).engine
    assert precision.encoder_fault(small_config(), engine, True) is None
    plain = engine.model_copy(update={"precision": "fp32"})
    assert precision.encoder_fault(small_config(vision=NORMED), plain, True) is None
