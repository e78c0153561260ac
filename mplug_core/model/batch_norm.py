"""Batch normalisation with fixed statistics: a backbone keeps those that it was pre-trained with, also while it learns.

A step's images are few, come from several data sets and are spread over processes: their statistics would differ from
those that the model is used with, and between processes. So a norm is a scale and a shift of each channel, both
learned, and the same in training and in use (as in detection, He et al., ICCV 2017). They are made in float32 from
weights and statistics of whatever types an engine keeps them in, and applied in the type of the images.

Behind a convolution the scale is taken into its weights and the shift is its bias, which saves two passes over the
largest tensors of a network, and those of the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug_core.model.compiler import without_compiler
from mplug_core.model.depthwise import convolve

with without_compiler():
    from timm.layers import BatchNormAct2d, Conv2dSame, pad_same

FOLDED_IN = {
    "EfficientNet", "MobileNetV3", "ConvBnAct", "DepthwiseSeparableConv", "InvertedResidual", "EdgeResidual",
    "ResNet", "BasicBlock", "Bottleneck", "Sequential",
}  # fmt: skip
"""Classes of modules that apply a norm right behind the convolution that stands before it among their children."""


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a norm does to each channel: float32 [C] and [C]."""
    scale = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.float()
    shift = -norm.running_mean.float() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.float()


class _Fixed:
    """A norm with fixed statistics, which the convolution before it may have applied (``in_convolution``)."""

    in_convolution = False

    def normalised(self, x: Tensor) -> Tensor:
        if self.in_convolution:
            return x
        scale, shift = (part.to(x.dtype)[:, None, None] for part in scale_and_shift(self))
        return torch.addcmul(shift, x, scale)


class FixedBatchNorm(_Fixed, nn.BatchNorm2d):
    """``x`` [B, C, H, W] to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalised(x)


class FixedBatchNormAct(_Fixed, BatchNormAct2d):
    """As :class:`FixedBatchNorm`, with the activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.normalised(x)))


class _Folded:
    """A convolution that applies the norm behind it, ``norm`` in a tuple: it is a child of another module."""

    norm: tuple[nn.BatchNorm2d]

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        scale, shift = scale_and_shift(self.norm[0])
        weight = self.weight.float() * scale[:, None, None, None]
        return weight.to(dtype), (shift if self.bias is None else shift + self.bias.float() * scale).to(dtype)


class FoldedConv(_Folded, nn.Conv2d):
    """``x`` [B, C, H, W] convolved and normalised."""

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return self._conv_forward(x, *self.folded(x.dtype))
        return convolve(x, *self.folded(x.dtype), self.stride, self.padding, self.dilation, self.groups)


class FoldedConvSame(_Folded, Conv2dSame):
    """As :class:`FoldedConv`, padded as TensorFlow pads."""

    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return convolve(x, *self.folded(x.dtype), self.stride, (0, 0), self.dilation, self.groups)


FIXED = {nn.BatchNorm2d: FixedBatchNorm, BatchNormAct2d: FixedBatchNormAct}
FOLDED = {nn.Conv2d: FoldedConv, Conv2dSame: FoldedConvSame}


def fix_statistics(network: nn.Module) -> None:
    """Give all batch norms of a network fixed statistics, in place; names and shapes of its tensors stay."""
    for module in list(network.modules()):
        if type(module) in FIXED and module.track_running_stats:
            module.__class__ = FIXED[type(module)]
    for module in network.modules():
        if type(module).__name__ not in FOLDED_IN:
            continue
        children = list(module.children())
        for convolution, norm in zip(children, children[1:], strict=False):
            if isinstance(norm, _Fixed) and type(convolution) in FOLDED:
                convolution.__class__ = FOLDED[type(convolution)]
                convolution.norm = (norm,)
                norm.in_convolution = True
