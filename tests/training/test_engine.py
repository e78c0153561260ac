"""Engines: DeepSpeed computes what plain PyTorch does, and bf16 keeps what it can't hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mplug_core.errors import RecipeError
from mplug_core.recipe import EngineSection, OptimizerSection
from mplug_core.training.distributed import World
from mplug_core.training.engine import BUCKET, PlainEngine, build_engine, deepspeed_config
from tests.training.losses import RUNS, losses
from tests.training.processes import result

ALONE = World(0, 1, 0)
FP32 = EngineSection(name="plain", precision="fp32")
BF16 = EngineSection(name="plain", precision="bf16")
FP32_RUNS = [name for name in RUNS if name.startswith("zero") and "bf16" not in name]
BF16_RUNS = [name for name in RUNS if name.startswith("zero") and "bf16" in name]
STEADY = OptimizerSection(lr=1e-2, warmup_steps=0, min_lr=1e-2, weight_decay=0.0, clip=1e9)


def deepspeed_losses(names: list[str]) -> dict[str, dict[str, list[float]]]:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return result("-m", "tests.training.losses", *names)


@pytest.fixture(scope="module")
def fp32_losses() -> dict[str, dict[str, list[float]]]:
    return deepspeed_losses(FP32_RUNS)


@pytest.fixture(scope="module")
def bf16_losses() -> dict[str, dict[str, list[float]]]:
    return deepspeed_losses(BF16_RUNS)


@pytest.fixture(scope="module")
def plain() -> dict[str, list[float]]:
    return losses(RUNS["plain"])


@pytest.mark.parametrize("name", FP32_RUNS)
def test_deepspeed_in_fp32_equals_plain(
    fp32_losses: dict[str, dict[str, list[float]]], plain: dict[str, list[float]], name: str
) -> None:
    found = fp32_losses[name]
    assert found["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    assert found["weights"] == pytest.approx(plain["weights"], rel=1e-4)
    if name != "zero 0":  # which doesn't tell
        assert found["norm"] == pytest.approx(plain["norm"], rel=1e-4)


@pytest.mark.slow  # where the processor has no units for bf16
@pytest.mark.parametrize("name", BF16_RUNS)
def test_deepspeed_in_bf16_is_near(
    bf16_losses: dict[str, dict[str, list[float]]], plain: dict[str, list[float]], name: str
) -> None:
    assert bf16_losses[name]["loss"] == pytest.approx(plain["loss"], abs=0.02)


def test_plain_accumulation_and_bf16(plain: dict[str, list[float]]) -> None:
    accumulated, half = losses(RUNS["plain accumulated"]), losses(RUNS["plain bf16"])
    assert accumulated["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    assert accumulated["norm"] == pytest.approx(plain["norm"], rel=1e-3)
    assert half["loss"] == pytest.approx(plain["loss"], abs=0.02)


class Weight(nn.Module):
    """A weight matrix of ones whose gradient is what it is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, factor: float) -> torch.Tensor:
        return (self.weight * factor).sum()


def test_bf16_masters_collect_steps_that_bf16_cannot_hold() -> None:
    engine = PlainEngine(Weight(), BF16, STEADY.model_copy(update={"lr": 1e-4, "min_lr": 1e-4}), ALONE)
    assert engine.module.weight.dtype == engine.module.frozen.dtype == torch.bfloat16
    for step in range(100):
        engine.backward(engine.forward(1.0))
        engine.step(step, 100)
    # a step of 1e-4 is lost in bf16, whose next number below 1 is 0.996
    assert engine.masters[0][0, 0].item() == pytest.approx(0.99, abs=1e-4)
    assert engine.module.weight[0, 0].item() == pytest.approx(0.99, abs=4e-3)


def test_accumulated_bf16_gradients_are_summed_in_fp32() -> None:
    engine = PlainEngine(Weight(), BF16.model_copy(update={"accumulate": 4}), STEADY, ALONE)
    for factor in (256.0, 1.0, 1.0):
        engine.backward(engine.forward(factor))
        assert engine.step(0, 10) is None
    engine.backward(engine.forward(1.0))
    assert engine.masters[0].grad[0, 0].item() == pytest.approx(259 / 4)
    assert engine.step(0, 10) == pytest.approx(2 * 259 / 4)


def test_clipping_and_rate_by_hand() -> None:
    settings = OptimizerSection(lr=0.1, warmup_steps=0, weight_decay=0.0, clip=1.0)
    engine = PlainEngine(Weight(), FP32, settings, ALONE)
    engine.backward(engine.forward(3.0))
    assert engine.step(0, 10) == pytest.approx(6.0)
    # Adam's first step is the learning rate, whatever the gradient
    assert engine.module.weight[0, 0].item() == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("settings", [FP32, BF16])
def test_plain_checkpoint_goes_on_exactly(tmp_path: Path, settings: EngineSection) -> None:
    def go(engine: PlainEngine, first: int, last: int) -> None:
        for step in range(first, last):
            engine.backward(engine.forward(float(step % 3 - 1)))
            engine.step(step, 8)

    whole, first, second = (PlainEngine(Weight(), settings, STEADY, ALONE) for _ in range(3))
    go(whole, 0, 8)
    go(first, 0, 5)
    first.save(tmp_path)
    second.load(tmp_path)
    go(second, 5, 8)
    assert torch.equal(second.masters[0], whole.masters[0])
    assert torch.equal(second.module.weight, whole.module.weight)


def test_plain_runs_in_one_process() -> None:
    with pytest.raises(RecipeError, match="plain runs in one process"):
        build_engine(Weight(), FP32, STEADY, World(0, 2, 0), 4)


def test_deepspeed_configuration() -> None:
    settings = EngineSection(zero_stage=2, precision="bf16", accumulate=3, offload="optimizer")
    config = deepspeed_config(settings, OptimizerSection(clip=0.5), batch_size=4, world_size=2)
    assert config["train_batch_size"] == 24 and config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] and config["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = {"stage": 2, "reduce_bucket_size": BUCKET, "offload_optimizer": {"device": "cpu"}}
    assert config["zero_optimization"] == zero
    with pytest.raises(ValueError, match="bf16 needs zero_stage"):
        EngineSection(zero_stage=0, precision="bf16")
