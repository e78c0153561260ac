"""A stored model at another image size: what depends on the grid of the image's tokens is resized to the new one."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import grid_sines
from mplug_core.model.vision import VisualEncoder, resize_positions


def at_image_size(config: MplugConfig, state: dict[str, Tensor], size: int) -> tuple[MplugConfig, dict[str, Tensor]]:
    """The configuration for images of ``size`` pixels a side, and the tensors that fit it.

    Positions of a transformer's patches are resized, those of a convolutional grid computed. CheckpointError for a size
    that the visual encoder can't take.
    """
    if size == config.vision.image_size:
        return config, state
    config = config.model_copy(update={"vision": config.vision.model_copy(update={"image_size": size})})
    with torch.device("meta"):
        visual = VisualEncoder(config)
    state = dict(state)
    if visual.is_transformer:
        patch = max(visual.backbone.patch_embed.patch_size)
        if size < patch or size % patch:
            nearest = max(round(size / patch), 1) * patch
            raise CheckpointError(f"image size {size} is no multiple of the patches' {patch} pixels", f"try {nearest}")
        name = "visual.backbone.pos_embed"
        if name in state:
            state[name] = resize_positions(state[name][0], visual.grid, visual.backbone.num_prefix_tokens)[None]
    elif "grid_positions" in state:
        state["grid_positions"] = grid_sines(*visual.grid, config.width)
    return config, state
