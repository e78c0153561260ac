"""What steps are computed in: fp32, or bf16 on a device that multiplies matrices in it.

Without such units a CPU computes bf16 by hand, tens of times slower than fp32; a recipe's ``precision: auto`` never
asks that of it.
"""

from __future__ import annotations

import torch

from mplug_core.device import multiplies_bf16
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
