"""Shapes that come again: on a CPU a product in low precision has its kernel made for its shape.

oneDNN, which computes bfloat16 products, compiles a kernel for each shape at its first use, a few milliseconds, and
keeps a thousand. Texts of all lengths in batches of all sizes are new shapes in every step: that was half of a training
step. So rows and lengths are rounded up, and more kernels are kept. (float32 products are another library's, without
kernels by shape.)
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

ROWS, LENGTH, TOKENS = 16, 4, 128
"""What numbers of texts, lengths of texts and numbers of tokens that are given to a language head are rounded up to."""
KEPT = 8192
"""Kernels that are kept."""


def keep_kernels() -> None:
    """Have oneDNN keep as many kernels as the rounded shapes of a training run need; before the first product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT))


def made_for_shapes(weight: Tensor) -> bool:
    """Whether products with a weight have kernels that are made for their shapes."""
    low = weight.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    return low and weight.device.type == "cpu" and not torch.compiler.is_compiling()


def rounded(number: int, step: int) -> int:
    """The next multiple of ``step``; of a number below it, the next power of two."""
    return -(-number // step) * step if number > step else 1 << max(0, number - 1).bit_length()
