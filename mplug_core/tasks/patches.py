"""Dense labels per patch of generated scenes: warms up a visual encoder that starts from nothing.

It stands for the pre-trained CLIP of the full-size recipes. The head belongs to training and is not exported.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.placement import WHOLE, Placement
from mplug_core.data.records import Records
from mplug_core.data.scenes import WORLD, patch_labels, read_scenes
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.recipe import DataSpec
from mplug_core.tasks.task import Context, Texts, rows


class SceneImage:
    """A scene and its picture, as a record."""

    def __init__(self, image: Path, scene: Any) -> None:
        self.image, self.scene = image, scene

    def placed(self, placements: Sequence[Placement]) -> SceneImage | None:
        """The scene as it is shown; None where it isn't whole or not at its size, which is one of the labels."""
        (placement,) = placements
        if placement == WHOLE:
            return self
        if abs(placement.x_scale) != 1 or placement.y_scale != 1:
            return None
        objects = tuple(replace(item, box=placement.to_square(item.box)) for item in self.scene.objects)
        curtain = self.scene.curtain and placement.to_square(self.scene.curtain)
        return SceneImage(self.image, replace(self.scene, objects=objects, curtain=curtain))


class PatchTask(nn.Module):
    """Image tokens to shape, colour, size and box of the object in their patch."""

    name = "patches"
    objectives = ("patches",)
    options = ()

    def __init__(self, config: MplugConfig, grid: int) -> None:
        """``grid``: the image's tokens are ``grid`` x ``grid`` cells, behind any other tokens."""
        super().__init__()
        self.grid, self.size = grid, config.vision.image_size
        self.counts = {"shape": len(WORLD.shapes) + 1, "color": len(WORLD.colors) + 1, "size": len(WORLD.sizes) + 1}
        self.head = nn.Linear(config.width, sum(self.counts.values()) + 4)

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        source = Path(spec.path) / (spec.split or "train") / "scenes.jsonl"
        return Records([SceneImage(image, scene) for image, scene in read_scenes(source)], source, "jsonl")

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        patch = self.size // self.grid
        labels = [
            patch_labels(r.scene.objects, self.grid * patch, patch, getattr(r.scene, "curtain", None)) for _, r in drawn
        ]
        block = {name: torch.stack([torch.from_numpy(item[name]) for item in labels]) for name in (*self.counts, "box")}
        return {"image": rows(drawn), **block}

    def losses(self, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        if not context.wants("patches"):
            return {}
        cells = images.tokens[block["image"]][:, -self.grid * self.grid :]
        predicted = self.head(cells).float()
        *classes, box = predicted.split([*self.counts.values(), 4], -1)
        loss = sum(
            F.cross_entropy(logits.flatten(0, 1), block[name].flatten())
            for name, logits in zip(self.counts, classes, strict=True)
        )
        inside = block["shape"].flatten(1) > 0
        distance = (box - block["box"].flatten(1, 2)).abs().mean(-1)
        return {"patches": loss + 5 * (distance * inside).sum() / inside.sum().clamp(min=1)}

    def evaluate(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError("dense labels are for warming up only")
