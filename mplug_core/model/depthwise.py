"""Grouped convolutions whose gradients are computed where a CPU is fast: in float32, channels last.

oneDNN's bfloat16 kernels for the gradients of depthwise convolutions take 2 to 12 times as long as those of float32, on
CPUs with matrix units, too (PyTorch 2.14): two thirds of a training step of EfficientNet-lite0. ``python -m
benchmarks.depthwise`` measures both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = tuple[int, int]


class _Float32Gradients(torch.autograd.Function):
    """A convolution in the type of its inputs; its gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation, groups
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wanted = list(ctx.needs_input_grad[:3])
        gradient, inputs = (part.to(torch.float32, memory_format=torch.channels_last) for part in (gradient, x))
        found = torch.ops.aten.convolution_backward(
            gradient, inputs, weight.float(), [len(weight)], stride, padding, dilation, False, (0, 0), groups, wanted
        )
        types = (x.dtype, weight.dtype, weight.dtype)
        parts = (part.to(kind) if part is not None else None for part, kind in zip(found, types, strict=True))
        return *parts, None, None, None, None


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """:func:`torch.nn.functional.conv2d` of ``x`` [B, C, H, W], whose gradients don't crawl on a CPU in bfloat16."""
    inputs = x, weight, bias, stride, padding, dilation, groups
    slow = groups > 1 and x.device.type == "cpu" and x.dtype is torch.bfloat16 and torch.is_grad_enabled()
    return _Float32Gradients.apply(*inputs) if slow else F.conv2d(*inputs)
