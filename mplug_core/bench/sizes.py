"""The named sizes as they are measured: with the image size that gives the vision transformers 577 tokens."""

from __future__ import annotations

from mplug_core.model.config import MplugConfig

IMAGES = {"tiny": (96, 36), "small": (384, 577), "base": (384, 577), "large": (336, 577)}
"""Pixels of a side, and the tokens that come of it."""


def measured_config(size: str) -> MplugConfig:
    """The named size at the image size of :data:`IMAGES`; RecipeError if there is no such size."""
    config = MplugConfig.named(size)
    vision = config.vision.model_copy(update={"image_size": IMAGES[size][0]})
    return config.model_copy(update={"vision": vision})


def image_tokens(size: str) -> int:
    """Tokens of an image of :func:`measured_config`."""
    return IMAGES[size][1]
