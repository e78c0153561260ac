"""Texts of a batch in pieces of like length, so that little is computed for padding.

In a batch of captions the longest is two or three times as long as most. On a CPU, where a product's time is that of
its rows, pieces cost less than padding; on a GPU one large product is cheaper, and lengths would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 16
"""Rows of a piece, at least."""
WORTH = 0.85
"""Share of the padded tokens that pieces may compute at most to be worth their overhead."""


def pieces_by_length(mask: Tensor) -> list[tuple[Tensor, int]] | None:
    """Rows [n] of each piece and the length of its longest text, from ``mask`` [B, T] (1 = real, padded on the right).

    None where a single pass is as good.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or len(mask) < 2 * LEAST:
        return None
    # the place of the last real token: a mask may have holes
    lengths, order = (mask.bool() * torch.arange(1, mask.shape[1] + 1)).amax(1).sort()
    pieces = min(4, len(mask) // LEAST)
    found = [(rows, max(1, int(lengths[part[-1]]))) for rows, part in _parts(order, pieces)]
    computed = sum(len(rows) * longest for rows, longest in found)
    return found if computed <= WORTH * mask.numel() else None


def _parts(order: Tensor, pieces: int) -> list[tuple[Tensor, Tensor]]:
    places = torch.arange(len(order)).chunk(pieces)
    return [(order[part], part) for part in places]


def in_pieces(pieces: list[tuple[Tensor, int]], length: int, compute: Callable[[Tensor, int], Tensor]) -> Tensor:
    """[B, ``length``, W]: what ``compute`` gives for the rows [n] of each piece, of a length [n, its length, W]; zeros
    behind it."""
    parts = [F.pad(compute(rows, longest), (0, 0, 0, length - longest)) for rows, longest in pieces]
    back = torch.cat([rows for rows, _ in pieces]).argsort()
    return torch.cat(parts)[back]
