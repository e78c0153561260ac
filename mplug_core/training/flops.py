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
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import Recipe, StageSection
from mplug_core.training.step import TrainStep
from mplug_core.training.tracing import ShapeMode, Trace, fused_attention
from mplug_core.training.workload import Workbench, build_context, build_parts

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
    grad_bytes: int = 0,
) -> Trace:
    """A step of ``stage`` on ``sizes`` images of each source, with its own objectives or others.

    ``device`` is cpu or cuda, whose attention keeps other things. ``grad_bytes`` an element of a gradient takes once it
    is complete; 0: it stays as autograd makes it.
    """
    recipe, dtype = bench.recipe, compute_type(bench.recipe)
    wanted = dict(objectives or bench.objectives_of(stage))
    mode = ShapeMode(bench.seen)
    batches = [bench.unread(name).batch(size) for name, size in sizes.items()]
    with torch.device("meta"):
        parts = build_parts(bench, stage, wanted)
    mode.empty_like_module(parts.step, dtype)
    for module in (parts.teacher, parts.queue):
        if module is not None:
            mode.empty_like_module(module)

    @contextmanager
    def autocast() -> Iterator[None]:
        with mode.teacher(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            yield

    contexts = [build_context(recipe, batch, wanted, parts, autocast) for batch in batches]
    if grad_bytes:
        take_gradients(mode, parts.step, grad_bytes)
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


def take_gradients(mode: ShapeMode, step: TrainStep, grad_bytes: int) -> None:
    """Gradients as engines keep them: taken from autograd as each is complete, and kept in another type."""

    def take(parameter: Tensor) -> None:
        mode.hold(parameter.numel() * grad_bytes)
        parameter.grad = None

    for parameter in step.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(take)
