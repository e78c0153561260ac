"""One training step as a module: batches in, losses out. What an engine wraps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mplug_core.data.batches import Batch
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.model.teacher import FeatureQueue, Teacher
from mplug_core.objectives.contrastive import EMPTY
from mplug_core.recipe import Recipe
from mplug_core.tasks.task import Context
from mplug_core.training.distributed import ALONE, World
from mplug_core.training.stand_in import StandIn


class TrainStep(nn.Module):
    """The model, the modules that belong to training alone, and the sum of all losses."""

    def __init__(self, model: MplugModel, tasks: Mapping[str, Any], stand_in: StandIn | None = None) -> None:
        super().__init__()
        self.model = model
        self.tasks = dict(tasks)
        self.task_heads = nn.ModuleDict({name: t for name, t in tasks.items() if isinstance(t, nn.Module)})
        self.stand_in = stand_in

    def forward(
        self, batches: list[Batch], contexts: list[Context], weights: Mapping[str, float]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted sum of the losses, and the losses by name (detached).

        A loss that several sources give is the mean over the records of those that were merged, and over batches their
        mean, weighted by images and by the source's ``weight``. Blocks that
        stand in for what another process has are computed with no weight, and none of their losses is returned by name.
        """
        found: dict[str, list[tuple[float, Tensor]]] = {}
        for batch, context in zip(batches, contexts, strict=True):
            images = self.encode(batch, context)
            for task, block in batch.blocks.items():
                share = batch.weight * batch.images_of(task)
                has_no_weight = task in batch.weightless
                here = without_ids(context) if has_no_weight else context
                for name, loss in self.tasks[task].losses(self.model, images, block, here).items():
                    found.setdefault(name, []).append((0.0 if has_no_weight else share, loss.float()))
        parts = {
            name: sum(share * loss for share, loss in given) / (sum(share for share, _ in given) or 1.0)
            for name, given in found.items()
        }
        total = sum(weights[name] * loss for name, loss in parts.items()) if parts else None
        learned = {name for name, given in found.items() if any(share for share, _ in given)}
        return total, {name: loss.detach() for name, loss in parts.items() if name in learned}

    def encode(self, batch: Batch, context: Context) -> ImageEncoding:
        """The batch's images, or what stands in for them."""
        if batch.stand_in is not None:
            return self.model.imagine(self.stand_in(batch.stand_in, context.generator))
        if batch.pixels is not None:
            images = self.model.encode_image(batch.pixels)
        else:
            images = self.model.encode_features(batch.features, batch.aligned)
        if batch.grid_dropout is not None:
            hidden = torch.rand(len(images), generator=context.generator) < batch.grid_dropout.float().cpu()
            images.mask[hidden.to(images.mask.device), self.model.config.summary_tokens :] = False
        return images


def build_context(
    recipe: Recipe,
    batch: Batch,
    weights: Mapping[str, float],
    alpha: float,
    teacher: Teacher | None,
    queue: FeatureQueue | None,
    autocast: Callable[[], AbstractContextManager],
    generator: torch.Generator,
    world: World = ALONE,
) -> Context:
    """What the losses of a batch see, as :func:`~mplug_core.training.merging.merge` gives it.

    The teacher encodes its images at the first question, and once.
    """
    encoded: list[ImageEncoding] = []

    def teacher_images() -> ImageEncoding:
        if not encoded:
            with torch.no_grad(), autocast():
                if batch.pixels is not None:
                    encoded.append(teacher.model.encode_image(batch.pixels))
                else:
                    encoded.append(teacher.model.encode_features(batch.features, batch.aligned))
        return encoded[0]

    imagined = batch.stand_in is not None
    return Context(
        alpha=0.0 if imagined else alpha,
        label_smoothing=recipe.label_smoothing,
        weights=dict(weights),
        teacher=None if imagined else teacher,
        teacher_images=teacher_images,
        queue=queue,
        gather=world.gather_rows,
        gather_with_gradient=world.gather_with_gradient if recipe.gather_gradient else world.gather_own_gradient,
        image_ids=None if imagined else batch.image_ids,
        generator=generator,
        autocast=autocast,
        self_critical=recipe.self_critical,
    )


def lot_of(micro_step: int, rank: int, world: int) -> int:
    """The number of the lot that process ``rank`` of ``world`` computes in a micro-step of the run."""
    return micro_step * world + rank


def begin_lot(seed: int, lot: int) -> torch.Generator:
    """The generator (on the CPU) of what the losses of a lot draw.

    torch's global generators, from which dropout draws, begin anew with each lot, too: what is drawn depends on the lot
    alone, not on the process that computes it, nor on what that has computed before.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 * 1024 + lot)
    torch.manual_seed((2 * generator.initial_seed() + 1) % 2**63)
    return generator


def without_ids(context: Context) -> Context:
    """For pairs that are none: their features are no keys for anybody, here or on other processes."""
    if context.image_ids is None:
        return context
    return replace(context, image_ids=torch.full_like(context.image_ids, EMPTY))
