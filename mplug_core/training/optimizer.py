"""AdamW with two learning rates, weight decay only where it belongs, and the warm-up and cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from mplug_core.recipe import OptimizerSection, StageSection


def parameter_groups(module: nn.Module, settings: OptimizerSection) -> list[dict]:
    """Groups by (visual encoder or rest) x (decayed or not). Biases, norms and other vectors are not decayed.

    Each group carries ``base_lr``, which :func:`scheduled_lr` scales.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            tower = "visual" if ".visual." in f".{name}" else "rest"
            groups.setdefault((tower, parameter.dim() > 1), []).append(parameter)
    rates = {"rest": settings.lr, "visual": settings.visual_lr or settings.lr}
    return [
        {
            "params": parameters,
            "lr": rates[tower],
            "base_lr": rates[tower],
            "weight_decay": settings.weight_decay if decayed else 0.0,
            "tower": tower,
        }
        for (tower, decayed), parameters in groups.items()
    ]


def build_optimizer(groups: list[dict], settings: OptimizerSection) -> torch.optim.AdamW:
    """PyTorch's AdamW; DeepSpeed's own need a compiler.

    Fused: one pass over memory, and no copies of whole groups, which ZeRO has flattened to one tensor each.
    """
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def for_stage(settings: OptimizerSection, stage: StageSection) -> OptimizerSection:
    """The optimizer's settings with what the stage says laid over them."""
    given = {name: getattr(stage, name) for name in ("lr", "visual_lr", "warmup_steps", "min_lr")}
    return settings.model_copy(update={name: value for name, value in given.items() if value is not None})


def scheduled_lr(step: int, steps: int, base: float, settings: OptimizerSection) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``: linear from ``warmup_lr`` to ``base``, then cosine."""
    warmup = min(settings.warmup_steps, steps)
    if step < warmup:
        return min(settings.warmup_lr, base) + (base - min(settings.warmup_lr, base)) * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = min(settings.min_lr, base)
    return floor + (base - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
