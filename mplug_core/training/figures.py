"""The figures of a training step by what they are: where it is, losses, rates, counters. Needs no torch.

A step's figures are one flat mapping, the same in ``metrics.jsonl``, on the terminal and in a tracker. What is no place
and no rate is a loss if it is a float and a counter if it is an int.
"""

from __future__ import annotations

from typing import Any

PLACE = frozenset(("stage", "step", "stage_step", "stage_steps", "evaluation", "evaluation_seconds"))
RATES = frozenset(
    (
        "grad_norm", "grad_norm_max", "lr", "visual_lr", "images_per_second", "tokens_per_second", "mfu", "memory_gb",
        "seconds", "eta_seconds", "reward", "alpha", "temperature", "world_size", "batch_size",
    )
)  # fmt: skip


def is_number(value: Any) -> bool:
    """Whether a figure can be drawn; NaN and infinities can, as gaps."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def loss_figures(figures: dict[str, Any]) -> dict[str, float]:
    """The losses among the figures of a step, the weighted sum ``loss`` first."""
    found = {name: value for name, value in figures.items() if is_loss(name) and isinstance(value, float)}
    return dict(sorted(found.items(), key=lambda item: item[0] != "loss"))


def counters(figures: dict[str, Any]) -> dict[str, int]:
    """What has been counted since the run began, and is not zero: skipped steps, bad images."""
    return {name: value for name, value in figures.items() if is_counter(name, value) and value}


def is_loss(name: str) -> bool:
    """Whether a figure of this name is a loss, given that it is a float."""
    return name not in PLACE and name not in RATES


def is_counter(name: str, value: Any) -> bool:
    """Whether a figure is a counter: an int that is neither a place nor a rate."""
    return is_loss(name) and isinstance(value, int) and not isinstance(value, bool)


def clock(seconds: float) -> str:
    """1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
