"""What steps are computed in: fp32, or bf16 on a device that multiplies matrices in it.

Without such units a CPU computes bf16 by hand, tens of times slower than fp32; a recipe's ``precision: auto`` never
asks that of it.
"""

from __future__ import annotations

import torch

from mplug_core.device import multiplies_bf16
from mplug_core.model.config import MplugConfig
from mplug_core.model.vision import VisualEncoder
from mplug_core.recipe import EngineSection
from mplug_core.training.distributed import ALONE, World


def settled(engine: EngineSection, device: torch.device, world: World = ALONE) -> EngineSection:
    """``engine`` with ``precision: auto`` replaced by what all processes of ``world`` compute well in.

    DeepSpeed's stage 0 has no bf16 (see :class:`EngineSection`): there auto is fp32.
    """
    if engine.precision != "auto":
        return engine
    possible = engine.name == "plain" or engine.zero_stage > 0
    everywhere = not world.any(not multiplies_bf16(device))
    return engine.model_copy(update={"precision": "bf16" if possible and everywhere else "fp32"})


def encoder_fault(config: MplugConfig, engine: EngineSection, learns: bool) -> str | None:
    """Why this machine's CPU can't compute the visual encoder in an engine's precision, and its gradient where it
    ``learns``; None where it can.

    A vision transformer is made of what every step uses. Other backbones bring layers of their own, some of which not
    every processor has in bf16: a picture is computed, with weights of any values.
    """
    if engine.precision != "bf16":
        return None
    encoder = VisualEncoder(config)
    if encoder.is_transformer:
        return None
    size = config.vision.image_size
    try:
        with torch.set_grad_enabled(learns):
            tokens = encoder.to(torch.bfloat16).train(learns)(torch.zeros(1, 3, size, size, dtype=torch.bfloat16))
            if learns:
                tokens.float().sum().backward()
    except RuntimeError as error:
        return f"{config.vision.backbone} can't be computed in bf16 here: {str(error).splitlines()[0]}"
    return None
