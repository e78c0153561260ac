"""Visual encoder: any timm backbone as a sequence of tokens, and the position embedding at any resolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mplug_core.errors import CheckpointError
from mplug_core.model.attention import fused_is_faster
from mplug_core.model.batch_norm import fix_statistics
from mplug_core.model.compiler import without_compiler
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import nearest

with without_compiler():
    import timm

TRANSFORMERS = ("vit", "deit", "deit3", "flexivit")
"""First words of the names of timm's plain vision transformers, which are built for an image size."""


def resize_positions(positions: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Resize a position embedding ``[prefix + h * w, C]`` of a square grid to ``grid``.

    Bilinear over the grid, the first ``prefix`` rows (the class token) kept, ``align_corners`` off.
    """
    kept, cells = positions[:prefix], positions[prefix:]
    side = round(len(cells) ** 0.5)
    if side * side != len(cells):
        raise CheckpointError(f"position embedding of {len(cells)} cells is not a square grid")
    if (side, side) == tuple(grid):
        return positions
    square = cells.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([kept, resized.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(cells.dtype)])


class PatchProjection(nn.Conv2d):
    """A convolution whose windows lie side by side; on a CPU the matrix product that it is, which is faster: in fp32 by
    up to a tenth, in bf16 six times."""

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels`` [B, 3, H, W] to [B, C, H / patch, W / patch]."""
        if pixels.device.type != "cpu":
            return super().forward(pixels)
        down, across = self.kernel_size
        batch, channels, height, width = pixels.shape
        rows, columns = height // down, width // across
        pixels = pixels[:, :, : rows * down, : columns * across]
        windows = pixels.reshape(batch, channels, rows, down, columns, across).permute(0, 2, 4, 1, 3, 5)
        patches = F.linear(windows.reshape(batch, rows * columns, -1), self.weight.flatten(1), self.bias)
        return patches.transpose(1, 2).unflatten(2, (rows, columns))


class VisualEncoder(nn.Module):
    """A timm backbone whose last feature map or token sequence is the image's token sequence.

    A vision transformer gives all its tokens after its final norm, the class token first. A convolutional network
    gives the cells of its last grid, row by row; behind the last stage's channels stand those of ``vision.levels``,
    finer stages whose pixels under a cell lie side by side: they know colours, outlines and places that the last stage
    of a frozen network has forgotten. ``grid`` is (rows, columns) at the configured size, ``token_grid`` that of the
    model's image tokens, of which a cell gives ``vision.subcells`` in either direction. CheckpointError for a
    backbone that timm doesn't have, that can't be built as configured, or that gives neither.
    """

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        vision = config.vision
        if not timm.is_model(vision.backbone):
            known = nearest(vision.backbone, timm.list_models())
            raise CheckpointError(f"timm has no backbone {vision.backbone!r}{known}", "see timm.list_models()")
        options = dict(vision.options)
        if vision.backbone.split("_")[0] in TRANSFORMERS:
            # without a pooling, so that the final norm is on all tokens
            options = {"img_size": vision.image_size, "global_pool": "", **options}
        classes = config.image_head.classes if config.image_head else 0
        try:
            self.backbone = timm.create_model(vision.backbone, pretrained=False, num_classes=classes, **options)
        except Exception as error:  # timm checks little, and each of its models fails in its own way
            reason = f"{vision.backbone} can't be built with options {vision.options}: {error}"
            raise CheckpointError(reason, "correct model.vision.options") from error
        fix_statistics(self.backbone)
        self.is_transformer = isinstance(self.backbone, timm.models.vision_transformer.VisionTransformer)
        self.attentions = [module for module in self.backbone.modules() if getattr(module, "fused_attn", False)]
        self.levels = list(vision.levels)
        self.width = self.backbone.num_features
        if self.is_transformer and not self.backbone.has_class_token:
            raise CheckpointError(f"{vision.backbone} has no class token", "choose another model.vision.backbone")
        if self.is_transformer and (self.levels or vision.subcells > 1):
            raise CheckpointError(f"{vision.backbone} has no levels", "leave model.vision.levels and subcells out")
        if self.is_transformer:
            self.grid = self.token_grid = self.backbone.patch_embed.grid_size
            projection = self.backbone.patch_embed.proj
            if type(projection) is nn.Conv2d and projection.kernel_size == projection.stride:
                projection.__class__ = PatchProjection  # with the weights that timm has initialised
            # the contrastive feature is read off the class token
            self.pooled_width = self.width
        else:
            try:
                probe = self._probe(self.backbone.forward_features, vision.image_size)
            except (RuntimeError, AssertionError) as error:
                reason = f"{vision.backbone} takes no images of {vision.image_size} pixels: {error}"
                raise CheckpointError(reason, "correct model.vision") from error
            if probe.dim() != 4:
                reason = f"{vision.backbone} gives neither a grid nor a vision transformer's tokens"
                raise CheckpointError(reason, "choose another model.vision.backbone")
            _, self.last_width, *grid = self._channels_first(probe).shape
            self.grid = tuple(grid)
            self.pooled_width = 2 * self.last_width
            self.width = self.last_width
            self.level_widths: list[int] = []
            self.level_sides: list[int] = []  # how many of a level's pixels lie side by side under a cell
            if self.levels:
                try:
                    _, *folded = self._probe(self._folded, vision.image_size)
                except (AttributeError, AssertionError, IndexError, RuntimeError) as error:
                    reason = f"levels {self.levels} of the backbone can't be had: {error}"
                    raise CheckpointError(reason, "correct model.vision.levels") from error
                self.level_widths = [grid.shape[1] for grid in folded]
                channels = [self._feature(level)["num_chs"] for level in self.levels]
                self.level_sides = [math.isqrt(w // c) for w, c in zip(self.level_widths, channels, strict=True)]
                self.width += sum(self.level_widths)
            self.subcells = vision.subcells
            self.token_grid = tuple(cells * self.subcells for cells in self.grid)
            if any(side % self.subcells for side in self.level_sides or [1]):
                reason = f"levels {self.levels} are not {self.subcells} times as fine as the last grid"
                raise CheckpointError(reason, "correct model.vision.subcells or levels")

    def _probe(self, function: Callable[[Tensor], Tensor], size: int) -> Tensor:
        """What the backbone gives for no image at all, or if it does not take that, for a black one.

        Without images nothing is computed, and weights that are on the meta device may be stood in for by memory that
        nobody touches: the shapes of convolutions there are a second of Python and imports.
        """
        calls = _Calls(self.backbone, function)
        weights = {**dict(calls.named_parameters()), **dict(calls.named_buffers())}
        # in evaluation: else the probe would enter the statistics of batch norms
        self.backbone.eval()
        try:
            with torch.no_grad(), torch.device("cpu"):
                untouched = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in weights.items()}
                return functional_call(calls, untouched, (torch.zeros(0, 3, size, size),))
        except (RuntimeError, ArithmeticError, AssertionError, CheckpointError):
            with torch.no_grad():
                return function(torch.zeros(1, 3, size, size))
        finally:
            self.backbone.train()

    def _channels_first(self, grid: Tensor) -> Tensor:
        return grid.permute(0, 3, 1, 2) if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC" else grid

    @property
    def layers(self) -> list[nn.Module]:
        """A transformer's layers; a convolutional network has none."""
        return list(self.backbone.blocks) if self.is_transformer else []

    @property
    def stem(self) -> list[nn.Module]:
        """The backbone's modules up to its first level (without levels: its first feature map), or a vision
        transformer's patch embedding: what sees edges and colours, which no data set has to teach."""
        if self.is_transformer:
            return [self.backbone.patch_embed]
        last = self._feature(min(self.levels, default=0))["module"]
        names = [name for name, _ in self.backbone.named_modules() if name]
        inside = [name for name in names if name == last or name.startswith(f"{last}.")]
        before = names[: names.index(inside[-1]) + 1]
        return [self.backbone.get_submodule(name) for name in before if not last.startswith(f"{name}.")]

    def _feature(self, level: int) -> dict[str, Any]:
        """What timm says of a feature map: ``module``, ``num_chs``, ``reduction``."""
        known = self.backbone.feature_info
        return (known if isinstance(known, list) else known.info)[level]

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.backbone.set_grad_checkpointing(enabled)

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels`` [B, 3, H, W] normalised; returns [B, N, C]."""
        if self.is_transformer:
            fused = fused_is_faster(pixels)
            for attention in self.attentions:
                if attention.fused_attn != fused:  # timm's own switch, of this backbone alone
                    attention.fused_attn = fused
            return self.backbone.forward_features(pixels)
        # on a CPU convolutions are faster with the channels of a pixel side by side
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if self.levels:
            return self._with_levels(pixels)
        return self._channels_first(self.backbone.forward_features(pixels)).flatten(2).transpose(1, 2)

    def _with_levels(self, pixels: Tensor) -> Tensor:
        """[B, N, C]: the last grid's channels, then those of each level folded to its cells."""
        return torch.cat(self._folded(pixels), 1).flatten(2).transpose(1, 2)

    def _folded(self, pixels: Tensor) -> list[Tensor]:
        """The last grid [B, C, H, W], and each level with its pixels under a cell as channels."""
        last, levels = self.backbone.forward_intermediates(pixels, indices=self.levels)
        return [self._channels_first(last), *(self._fold(level) for level in levels)]

    def _fold(self, level: Tensor) -> Tensor:
        side = level.shape[-1] // self.grid[-1]
        # what pixel_unshuffle returns as it is; len() would fix the batch of an exported graph
        if level.shape[0] == 0:
            if tuple(level.shape[-2:]) != tuple(cells * side for cells in self.grid):
                raise RuntimeError(f"a grid of {level.shape[-2]} x {level.shape[-1]} does not divide into the last's")
            return level.new_empty(0, level.shape[1] * side**2, *self.grid)
        return F.pixel_unshuffle(level, side)

    def split_levels(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``tokens`` [B, N, C] of a convolutional network to the last grid's [B, N, C'] and, of each level, those of
        the token grid [B, N * subcells^2, its channels], row by row."""
        last, *levels = tokens.split([self.last_width, *self.level_widths], -1)
        return last, [self._subdivide(*pair) for pair in zip(levels, self.level_sides, strict=True)]

    def _subdivide(self, level: Tensor, side: int) -> Tensor:
        rows, columns = self.grid
        k, batch = self.subcells, level.shape[0]
        # the folding, taken back as far as subcells: what is left of a side stays channels
        fine = level.transpose(1, 2).unflatten(2, (rows, columns)).unflatten(1, (-1, side, side))
        fine = fine.unflatten(3, (k, -1)).unflatten(2, (k, -1))  # [B, c, k, s/k, k, s/k, rows, columns]
        fine = fine.permute(0, 6, 2, 7, 4, 1, 3, 5)
        return fine.reshape(batch, rows * k * columns * k, -1)

    def class_probabilities(self, tokens: Tensor) -> Tensor:
        """``tokens`` [B, N, C] of a convolutional network to what its own classifier sees [B, classes]."""
        return self.backbone.get_classifier()(tokens[..., : self.last_width].mean(1)).softmax(-1)

    def pool(self, tokens: Tensor) -> Tensor:
        """``tokens`` [B, N, C] of a convolutional network to [B, 2 C]: mean and maximum of the last stage."""
        last = tokens[..., : self.last_width]
        return torch.cat([last.mean(1), last.amax(1)], -1)


class _Calls(nn.Module):
    """A function of a module as a module of its own."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, pixels: Tensor) -> Tensor:
        return self.function(pixels)
