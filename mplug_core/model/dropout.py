"""Dropout that is cheap on a CPU.

PyTorch draws a number for each element there, on one thread, which takes as long as a matrix product of the same
tensor. Here eight elements share a 64-bit number, a byte for each: shares of 1/256 are as fine as dropout needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 256
"""How many values a byte has."""


class _ByteDropout(torch.autograd.Function):
    """Zero what draws a byte below ``dropped``, scale the rest up."""

    @staticmethod
    def forward(ctx, x: Tensor, dropped: int) -> Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        kept = (words.view(torch.uint8)[: x.numel()] >= dropped).view(x.shape)
        ctx.save_for_backward(kept)
        ctx.scale = LEVELS / (LEVELS - dropped)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def drop(x: Tensor, share: float) -> Tensor:
    """``x`` with a ``share`` of its elements zeroed at random and the others scaled so that the mean stays.

    On a CPU the share is rounded to 1/256, and never to nothing or all.
    """
    if share == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, share)
    return _ByteDropout.apply(x, min(max(round(share * LEVELS), 1), LEVELS - 1))


class Dropout(nn.Module):
    """:func:`drop` in training, nothing in evaluation."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.share) if self.training else x

    def extra_repr(self) -> str:
        return f"{self.share}"
