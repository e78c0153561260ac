"""Parameter groups and the schedule, by hand."""

from __future__ import annotations

import math

import pytest

from mplug_core.recipe import OptimizerSection, StageSection
from mplug_core.tasks.patches import PatchTask
from mplug_core.training.optimizer import build_optimizer, for_stage, parameter_groups, scheduled_lr
from mplug_core.training.step import TrainStep
from tests.small import CNN, VIT, small_model

SETTINGS = OptimizerSection(lr=1.0, visual_lr=0.1, warmup_steps=4, warmup_lr=0.2, min_lr=0.05, weight_decay=0.02)


def test_schedule_by_hand() -> None:
    rates = [scheduled_lr(step, 12, 1.0, SETTINGS) for step in range(13)]
    # four steps up from 0.2, eight down a cosine to 0.05
    assert rates[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert rates[8] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[6] == pytest.approx(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[12] == pytest.approx(0.05) and scheduled_lr(99, 12, 1.0, SETTINGS) == pytest.approx(0.05)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_slow_group_never_rises_above_its_rate() -> None:
    rates = [scheduled_lr(step, 12, 0.1, SETTINGS) for step in range(13)]
    # it starts at its own rate, not at the warm-up's higher one
    assert rates[:5] == pytest.approx([0.1] * 5) and rates[12] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(0.1)


def test_floor_above_the_rate_is_the_rate() -> None:
    assert scheduled_lr(11, 12, 0.01, SETTINGS) == pytest.approx(0.01)


def test_short_runs() -> None:
    assert scheduled_lr(0, 1, 1.0, SETTINGS) == pytest.approx(1.0)
    assert [scheduled_lr(s, 2, 1.0, SETTINGS) for s in range(2)] == pytest.approx([0.6, 1.0])
    none = SETTINGS.model_copy(update={"warmup_steps": 0})
    assert scheduled_lr(0, 10, 1.0, none) == pytest.approx(1.0)


@pytest.mark.parametrize("vision", [VIT, CNN])
def test_groups(vision: dict) -> None:
    model = small_model(vision=vision, summary_tokens=2)
    module = TrainStep(model, {"patches": PatchTask(model.config, 2)})
    model.fusion.requires_grad_(False)
    groups = parameter_groups(module, SETTINGS)
    place = {id(p): (g["tower"], g["weight_decay"], g["base_lr"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(place) and len(groups) == 4
    for name, parameter in module.named_parameters():
        if name.startswith("model.fusion."):
            assert id(parameter) not in place
            continue
        tower, decay, rate = place[id(parameter)]
        # what projects out of the visual encoder is new and learns like the rest
        assert tower == ("visual" if name.startswith("model.visual.") else "rest"), name
        assert rate == (0.1 if tower == "visual" else 1.0)
        plain = name.endswith("bias") or "norm" in name or parameter.dim() < 2
        if plain:
            assert decay == 0, name
        else:
            assert decay == 0.02, name


def test_visual_rate_defaults_to_the_rest() -> None:
    groups = parameter_groups(small_model(), OptimizerSection(lr=0.5))
    assert {g["base_lr"] for g in groups} == {0.5}


def test_optimizer_has_the_settings() -> None:
    settings = OptimizerSection(betas=(0.8, 0.9), eps=1e-5)
    optimizer = build_optimizer(parameter_groups(small_model(), settings), settings)
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-5 for g in optimizer.param_groups)


def test_stage_overrides_what_it_says() -> None:
    changed = for_stage(SETTINGS, StageSection(name="x", lr=0.3, min_lr=0.0, warmup_steps=0))
    assert (changed.lr, changed.min_lr, changed.warmup_steps) == (0.3, 0.0, 0)
    assert changed.visual_lr == 0.1 and changed.weight_decay == 0.02
    assert for_stage(SETTINGS, StageSection(name="x")) == SETTINGS
