"""What an engine saves by parameter: complete, exact, and readable by every other engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mplug_core.errors import CheckpointError
from mplug_core.recipe import EngineSection, OptimizerSection
from mplug_core.training.distributed import World
from mplug_core.training.engine import PlainEngine
from mplug_core.training.engine_state import state_bytes, whole_state
from tests.training.processes import result

FILE = "engine-00000-of-00001.safetensors"
STEADY = OptimizerSection(lr=1e-2, warmup_steps=0, min_lr=1e-2, weight_decay=0.0, clip=1e9)


class Tied(nn.Module):
    """A weight under two names, one that is frozen, one that is only sometimes used, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.sometimes = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.tensor([7]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("computed", torch.ones(3), persistent=False)

    def forward(self, step: int) -> torch.Tensor:
        x = torch.full((1, 3), float(step % 3 - 1), dtype=self.frozen.dtype)
        loss = self.second(torch.tanh(self.first(x))).sum()
        return loss + self.sometimes.sum() if step == 2 else loss


def engine(precision: str = "bf16", seed: int = 0, module: nn.Module | None = None) -> PlainEngine:
    torch.manual_seed(seed)
    return PlainEngine(module or Tied(), EngineSection(name="plain", precision=precision), STEADY, World(0, 1, 0))


def go(engine: PlainEngine, first: int, last: int) -> None:
    for step in range(first, last):
        engine.backward(engine.forward(step))
        engine.step(step, 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("at", [1, 5])
def test_goes_on_exactly(tmp_path: Path, precision: str, at: int) -> None:
    """Also what had no gradient yet, whose own count of updates is behind, and in an engine that has already run."""
    whole, first, second = engine(precision), engine(precision), engine(precision, seed=1)
    go(whole, 0, 8)
    go(first, 0, at)
    go(second, 0, 3)
    second.optimizer.state.clear()
    first.save(tmp_path)
    second.load(tmp_path)
    go(second, at, 8)
    assert all(torch.equal(a, b) for a, b in zip(second.masters, whole.masters, strict=True))
    for name, value in whole.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], value), name
    steps = {name: whole.state.steps(p) for name, p in whole.module.named_parameters() if p.requires_grad}
    assert steps == {n: second.state.steps(p) for n, p in second.module.named_parameters() if p.requires_grad}
    assert steps["sometimes"] == 1 and steps["first.weight"] == 8


def test_file_is_what_it_says(tmp_path: Path) -> None:
    one = engine()
    go(one, 0, 3)
    one.save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    trained = {"first.weight", "first.bias", "second.bias", "sometimes"}
    others = {"other/frozen", "other/count", "other/mask"}
    keys = ("master", "exp_avg", "exp_avg_sq", "step")
    assert set(tensors) == {f"{key}/{name}" for key in keys for name in trained} | others
    assert tensors["master/first.weight"].dtype == torch.float32 and tensors["step/sometimes"] == 1
    assert torch.equal(tensors["master/first.weight"].bfloat16(), one.module.first.weight)
    assert not torch.equal(tensors["master/first.weight"], one.module.first.weight.float()), "not rounded"
    assert sum(value.nbytes for value in tensors.values()) == state_bytes(one)


def test_whole_state_is_of_the_masters(tmp_path: Path) -> None:
    one = engine()
    go(one, 0, 3)
    state = whole_state(one.module, one)
    assert set(state) == set(one.module.state_dict())
    assert torch.equal(state["second.weight"], one.state.masters[one.module.first.weight])
    assert state["second.weight"].data_ptr() != state["first.weight"].data_ptr()
    assert state["frozen"].dtype == torch.float32 and torch.equal(state["count"], one.module.count)
    before = state["first.weight"].clone()
    go(one, 3, 5)
    assert torch.equal(state["first.weight"], before), "a copy"
    assert whole_state(one.module, one, keep=False) == {}


CHANGES = {
    "lacks exp_avg/first.weight": lambda t: t.pop("exp_avg/first.weight"),
    "lacks step/sometimes": lambda t: t.pop("step/sometimes"),
    "lacks other/frozen": lambda t: t.pop("other/frozen"),
    r"master/first.bias has shape \(4,\), the recipe's model \(3,\)": lambda t: t.update(
        {"master/first.bias": torch.ones(4)}
    ),
    r"other/mask has shape \(1,\)": lambda t: t.update({"other/mask": torch.ones(1)}),
    "holds master/third, which": lambda t: t.update({"master/third": torch.ones(4)}),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_what_does_not_fit_is_named(tmp_path: Path, fault: str) -> None:
    engine().save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    CHANGES[fault](tensors)
    save_file(tensors, tmp_path / FILE)
    other = engine(seed=1)
    before = {name: value.clone() for name, value in other.module.state_dict().items()}
    with pytest.raises(CheckpointError, match=fault) as caught:
        other.load(tmp_path)
    assert caught.value.exit_code == 5
    assert all(torch.equal(value, before[name]) for name, value in other.module.state_dict().items())


@pytest.mark.parametrize("content", [None, b"", b"junk", "cut"])
def test_damaged_file(tmp_path: Path, content: bytes | str | None) -> None:
    engine().save(tmp_path)
    file = tmp_path / FILE
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20] if content == "cut" else content)
    with pytest.raises(CheckpointError, match="lacks" if content is None else "cannot read"):
        engine().load(tmp_path)


def continued(*words: str, processes: int = 1) -> dict[str, list[float]]:
    """Losses of steps that are gone on with, by the engine that saved and the one that loaded."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return result(*launcher, "-m", "tests.training.continued", *words)


BF16 = ["plain bf16", "zero 2 bf16", "zero 3 bf16"]
FP32 = ["plain", "zero 0", "zero 1", "zero 2", "zero 3"]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["plain", "zero 2"], id="some"),
        pytest.param([*FP32, *BF16, "zero 1 bf16"], id="all", marks=pytest.mark.slow),
    ],
)
def test_every_engine_goes_on_exactly_and_from_another(tmp_path: Path, names: list[str]) -> None:
    found = continued("both", str(tmp_path), *names)
    for name in names:
        assert found[f"{name} | {name}"] == found[f"{name} | uninterrupted"], f"{name}: not bit by bit"
        assert found[f"{name} | masters"] == [1.0] and found[f"{name} | rounded"] == [1.0], name
    crossed = [pair for pair in found if pair.split(" | ")[1] in names]
    assert len(crossed) >= 2 * len(names) - 2
    for pair in crossed:
        source, target = pair.split(" | ")
        within = 1e-5 if "bf16" not in source else 2e-3
        assert found[pair] == pytest.approx(found[f"{source} | uninterrupted"], abs=within), pair


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    """The global batch is the same, and so are the losses, whatever the stage."""
    names = ("zero 1 bf16", "zero 2", "zero 3", "zero 3 bf16")
    saved = continued("save", str(tmp_path), *names, processes=before)
    found = continued("load", str(tmp_path), *names, processes=after)
    assert len(found) == 8
    for pair, losses in found.items():
        source = pair.split(" | ")[0]
        within = 1e-5 if "bf16" not in source else 2e-3
        assert losses == pytest.approx(saved[f"{source} | uninterrupted"], abs=within), pair
