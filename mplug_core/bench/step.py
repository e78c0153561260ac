"""Real training steps for measuring: the recipe's modules and losses on random pixels and invented texts."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug_core.recipe import StageSection
from mplug_core.training.engine import Engine
from mplug_core.training.merging import merge
from mplug_core.training.workload import Workbench, build_parts


class RealStep:
    """The modules of a stage with random weights, and one batch of each source that every step is taken on."""

    def __init__(self, bench: Workbench, stage: StageSection) -> None:
        self.bench = bench
        self.objectives = bench.objectives_of(stage)
        self.parts = build_parts(bench, stage, self.objectives)
        self.module = self.parts.step
        sizes = {name: bench.recipe.data.sources[name].batch_size for name in bench.sources_of(stage)}
        self.batch_size = sum(sizes.values())
        drawn = [bench.unread(name, stage).batch(size) for name, size in sizes.items()]
        self.batches = merge(drawn, list(bench.recipe.data.sources))
        for batch in self.batches:
            if batch.pixels is not None:
                batch.pixels = torch.randn(batch.pixels.shape)

    def loss(self, engine: Engine) -> Tensor:
        """The sum of the losses on the batches, with the same draws at every call."""
        enabled = engine.dtype != torch.float32
        autocast = lambda: torch.autocast("cpu", engine.dtype, enabled=enabled)  # noqa: E731
        moved = [batch.to(torch.device("cpu"), engine.dtype) for batch in self.batches]
        contexts = [self.parts.context(self.bench.recipe, batch, self.objectives, autocast) for batch in moved]
        return engine.forward(moved, contexts, self.objectives)[0]

    def compute(self, engine: Engine) -> float:
        """One update of the weights, and of the teacher; returns the last loss."""
        for _ in range(self.bench.recipe.engine.accumulate):
            loss = self.loss(engine)
            engine.backward(loss)
            engine.step(0, 100)
        if self.parts.teacher is not None:
            self.parts.teacher.update(self.module.model, engine.whole)
        return float(loss.detach())
