"""Floating-point operations of training, counted on the real step (see :mod:`tracing`), and what devices can do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Batch, Source
from mplug_core.data.text import Tokenizer
from mplug_core.device import multiplies_bf16
from mplug_core.model.config import MplugConfig
from mplug_core.model.hollow import hollow
from mplug_core.recipe import Recipe, StageSection
from mplug_core.training.merging import merge
from mplug_core.training.tracing import ShapeMode, Trace, fused_attention
from mplug_core.training.workload import Workbench, build_parts

DEVICE_FLOPS = {
    "a100": {"bf16": 312e12, "fp32": 19.5e12},
    "h100": {"bf16": 989e12, "fp32": 67e12},
    "h200": {"bf16": 989e12, "fp32": 67e12},
    "v100": {"bf16": 15.7e12, "fp32": 15.7e12},
    "l4": {"bf16": 121e12, "fp32": 30.3e12},
    "rtx 4090": {"bf16": 165e12, "fp32": 82.6e12},
    "rtx 3090": {"bf16": 71e12, "fp32": 35.6e12},
}
"""Dense peak FLOP/s of a device by the compute type, as their makers state them (fp32 without TF32)."""

UTILISATION = 0.35
"""Share of the peak that a training run is assumed to reach on a device that can't be measured here."""


def compute_type(recipe: Recipe) -> torch.dtype:
    """What a recipe's engine computes in."""
    return torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32


def trace_step(
    bench: Workbench,
    stage: StageSection,
    sizes: Mapping[str, int],
    *,
    device: str = "cpu",
    objectives: Mapping[str, float] | None = None,
) -> Trace:
    """A step of ``stage`` on ``sizes`` images of each source, with its own objectives or others.

    ``device`` is cpu or cuda, whose attention keeps other things.
    """
    recipe, dtype = bench.recipe, compute_type(bench.recipe)
    wanted = dict(objectives or bench.objectives_of(stage))
    mode = ShapeMode(bench.seen)
    drawn = [bench.unread(name, stage).batch(size) for name, size in sizes.items()]
    batches = merge(drawn, list(recipe.data.sources))
    with hollow():
        parts = build_parts(bench, stage, wanted)
    mode.empty_like_module(parts.step, dtype)
    for module in (parts.teacher, parts.queue):
        if module is not None:
            mode.empty_like_module(module)

    @contextmanager
    def autocast() -> Iterator[None]:
        with mode.teacher(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            yield

    contexts = [parts.context(recipe, batch, wanted, autocast) for batch in batches]
    with ExitStack() as stack:
        if device != "cpu":
            stack.enter_context(fused_attention())
        stack.enter_context(mode)
        moved = [without_content(mode, batch, dtype) for batch in batches]
        loss, parted = parts.step(moved, contexts, wanted)
        if loss is not None and loss.requires_grad:
            with mode.backward():
                loss.backward()
        del loss, parted, moved
    return mode.trace


def without_content(mode: ShapeMode, batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch as an engine gets it; what was never read stays without content."""
    for name in ("pixels", "features", "stand_in", "aligned"):
        value = getattr(batch, name)
        if value is not None:
            setattr(batch, name, mode.fake(value, dtype))
    for block in batch.blocks.values():
        for name, value in block.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                block[name] = value.to(dtype)
    return batch


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of an image in a step of a stage, by kind (see :class:`Trace`), and ``alone`` of steps with one objective.

    ``images`` of all sources a step of one process takes, before accumulation.
    """

    images: int
    by_kind: dict[str, float]
    alone: dict[str, float] = field(default_factory=dict)

    @property
    def per_image(self) -> float:
        """All that the device computes, recomputation for checkpointing included."""
        return sum(self.by_kind.values())

    @property
    def useful_per_image(self) -> float:
        """Without recomputation: what model FLOPs utilisation (MFU) counts."""
        return self.per_image - self.by_kind.get("recomputed", 0.0)


def step_flops(bench: Workbench, stage: StageSection, each_objective: bool = False) -> StepFlops:
    """Traced on the stage's own batch; of like sources one is traced, at most ``TRACED_IMAGES`` of it."""
    images, by_kind = _counted(bench, stage, None)
    alone: dict[str, float] = {}
    if each_objective:
        for name, weight in bench.objectives_of(stage).items():
            alone[name] = sum(_counted(bench, stage, {name: weight})[1].values())
    return StepFlops(images, by_kind, alone)


TRACED_IMAGES = 16
"""Most images of a source that FLOPs are counted on: from there on they grow in proportion."""


def _counted(
    bench: Workbench, stage: StageSection, objectives: Mapping[str, float] | None
) -> tuple[int, dict[str, float]]:
    sections = bench.recipe.data.sources
    found: dict[Any, dict[str, float]] = {}
    by_kind: dict[str, float] = {}
    total = sum(sections[name].batch_size for name in bench.sources_of(stage))
    for name in bench.sources_of(stage):
        section = sections[name]
        alike = bench.likeness(name)
        if alike not in found:
            size = min(section.batch_size, TRACED_IMAGES)
            batch = bench.unread(name, stage).batch(size)
            trace = trace_step(bench, stage, {name: size}, objectives=objectives)
            found[alike] = {kind: count / len(batch.image_ids) for kind, count in trace.flops.items()}
        for kind, count in found[alike].items():
            by_kind[kind] = by_kind.get(kind, 0.0) + count * section.batch_size / total
    return total, by_kind


def training_flops_per_image(
    recipe: Recipe,
    config: MplugConfig,
    stage: StageSection | None = None,
    tokenizer: Tokenizer | None = None,
    sources: Mapping[str, Source] | Sequence[Source] = (),
) -> float | None:
    """FLOPs of forward, backward and teacher of one image in a stage (default: the first), without recomputation.

    Tokens are counted on the records of ``sources``, as far as given, else on invented ones. None where it can't be
    told: this never fails a run.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            bench = Workbench.of(recipe, config, tokenizer, sources)
            return step_flops(bench, stage or bench.stages[0]).useful_per_image
    except Exception:  # a figure for the log is not worth a run
        return None


def peak_flops(device: str | torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device: a name of :data:`DEVICE_FLOPS`, ``cuda`` or ``cuda:N`` (by its name), or ``cpu``,
    which is measured (a fifth of a second). None for a device that isn't known."""
    name = str(device).lower()
    if name == "cpu":
        return measured_flops(precision)
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name(device).lower()
    for known, figures in DEVICE_FLOPS.items():
        if known in name:
            return figures[precision]
    return None


@cache
def measured_flops(precision: str, size: int = 1024) -> float:
    """FLOP/s of matrix products of this CPU, with as many threads as PyTorch has now; the best of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = size if precision == "fp32" or multiplies_bf16(torch.device("cpu")) else size // 8  # or it takes seconds
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + 0.2
    with torch.inference_mode():
        left @ right
        while True:
            began = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - began)
            if time.perf_counter() > until:
                return 2 * size**3 / best
