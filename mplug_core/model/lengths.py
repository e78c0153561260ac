"""Texts of a batch in pieces of like length, so that little is computed for padding.

In a batch of captions the longest is two or three times as long as most. On a CPU, where a product's time is that of
its rows, pieces cost less than padding; on a GPU one large product is cheaper, and lengths would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mplug_core.model.kernels import LENGTH, ROWS, rounded

LEAST = 16
"""Rows of a piece, at least."""
WORTH = 0.85
"""Share of the padded tokens that pieces may compute at most to be worth their overhead."""


@dataclass(frozen=True)
class Piece:
    """Texts that go through the layers together."""

    rows: Tensor
    """Which of the batch's: the first ``real`` of them, then one of them again up to a round number."""
    real: int
    length: int
    """Tokens of each."""

    def of(self, texts: Tensor) -> Tensor:
        """The piece's [n, length, ...] of ``texts`` [B, T, ...], zeros behind T."""
        found = texts[self.rows, : self.length]
        return F.pad(found, (*(0, 0) * (found.dim() - 2), 0, self.length - found.shape[1]))


def pieces_by_length(mask: Tensor, round_up: bool = False, longest: int = 1 << 30) -> list[Piece] | None:
    """The pieces of texts with ``mask`` [B, T] (1 = real, padded on the right).

    ``round_up``: rows and lengths are round numbers, lengths of at most ``longest``. None where a single pass is as
    good.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or not mask.numel():
        return None
    # the place of the last real token: a mask may have holes
    lengths, order = (mask.bool() * torch.arange(1, mask.shape[1] + 1)).amax(1).sort()

    def cut(pieces: int) -> list[Piece]:
        found = []
        for part in torch.arange(len(order)).chunk(pieces):
            rows, real, length = order[part], len(part), max(1, int(lengths[part[-1]]))
            if round_up:
                rows = F.pad(rows, (0, rounded(real, ROWS) - real), value=int(rows[0]))
                length = min(rounded(length, LENGTH), longest)
            found.append(Piece(rows, real, length))
        return found

    found = cut(max(1, min(4, len(mask) // LEAST)))
    computed = sum(len(piece.rows) * piece.length for piece in found)
    if len(found) > 1 and computed <= WORTH * mask.numel():
        return found
    return cut(1) if round_up else None


def in_pieces(pieces: Sequence[Piece], length: int, compute: Callable[[Piece], Tensor]) -> Tensor:
    """[B, ``length``, W]: what ``compute`` gives for each piece [n, its length, W], texts only; zeros behind it."""
    parts = []
    for piece in pieces:
        found = compute(piece)[: piece.real, :length]
        parts.append(F.pad(found, (0, 0, 0, length - found.shape[1])))
    return torch.cat(parts)[places(pieces)]


def places(pieces: Sequence[Piece]) -> Tensor:
    """Where each text of the batch is in the joined results of pieces."""
    return torch.cat([piece.rows[: piece.real] for piece in pieces]).argsort()
