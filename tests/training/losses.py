"""Losses of a few steps under each engine, as JSON: ``python -m tests.training.losses``.

A process of its own, because DeepSpeed leaves a process group, environment variables and a logger behind.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from mplug_core.objectives.prefix_language import sequence_loss
from mplug_core.recipe import EngineSection, OptimizerSection
from mplug_core.training.distributed import World, end_process
from mplug_core.training.engine import build_engine
from tests.small import small_config

STEPS = 5
OPTIMIZER = OptimizerSection(lr=3e-3, visual_lr=1e-3, warmup_steps=2, weight_decay=0.1, clip=1.0)
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"name": "plain", "precision": "fp32"},
    "plain accumulated": {"name": "plain", "precision": "fp32", "accumulate": 2},
    "plain bf16": {"name": "plain", "precision": "bf16"},
    **{f"zero {stage}": {"zero_stage": stage, "precision": "fp32"} for stage in (0, 1, 2, 3)},
    "zero 2 offload": {"zero_stage": 2, "precision": "fp32", "offload": "optimizer"},
    "zero 3 offload": {"zero_stage": 3, "precision": "fp32", "offload": "parameters"},
    "zero 2 accumulated": {"zero_stage": 2, "precision": "fp32", "accumulate": 2},
    "zero 3 accumulated": {"zero_stage": 3, "precision": "fp32", "accumulate": 2},
    **{f"zero {stage} bf16": {"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)},
}


class Step(nn.Module):
    """Two towers of the small model under one loss."""

    def __init__(self) -> None:
        super().__init__()
        from mplug_core.model.mplug import MplugModel

        self.model = MplugModel(small_config(vocab_size=32))
        self.model.decoder.head.chunk = 4

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        ones = torch.ones_like(ids)
        memory, mask = self.model.memory(self.model.encode_image(pixels), self.model.encode_text(ids, ones), ones)
        # as many labels, and so chunks of the head, as ids happen to be left: not the same on every process
        return sequence_loss(
            self.model.decoder(ids[:, :-1], memory, mask), ids, ids % 3, reduction="sequence",
            denominator=4 * len(ids), head=self.model.decoder.logits,
        )  # fmt: skip


def losses(run: dict[str, Any]) -> dict[str, list[float]]:
    """Loss (mean over accumulated halves) and gradient norm of each step, and the weights' sum at the end."""
    torch.manual_seed(0)
    module = Step()
    settings = EngineSection(**run)
    count = 8 // settings.accumulate
    engine = build_engine(module, settings, OPTIMIZER, World(0, 1, 0), count)
    found: dict[str, list[float]] = {"loss": [], "norm": []}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(8, 3, 32, 32, generator=generator).to(engine.dtype)
        ids = torch.randint(5, 32, (8, 6), generator=generator)
        parts, norms = [], []
        for part in range(settings.accumulate):
            rows = slice(part * count, (part + 1) * count)
            loss = engine.forward(pixels[rows], ids[rows])
            engine.backward(loss)
            norms.append(engine.step(step, STEPS))
            parts.append(float(loss.detach()))
        assert [n is not None for n in norms] == [False] * (settings.accumulate - 1) + [True], norms
        found["loss"].append(sum(parts) / len(parts))
        found["norm"].append(norms[-1])
    inner = engine.module
    with engine.whole(list(inner.parameters())):
        found["weights"] = [float(sum(p.detach().double().abs().sum() for p in inner.parameters()))]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(RUNS)
    print("RESULT " + json.dumps({name: losses(RUNS[name]) for name in chosen}))
    end_process(0)
