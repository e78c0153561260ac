"""The cross-entropy that every token loss shares: hard, smoothed and distilled targets, at full precision.

Masked language modelling, the decoder's losses and the box tokens all end here, so that precision, smoothing and
distillation are decided once. Distillation runs over the vocabulary (the last axis), never over the sequence.

A large vocabulary makes logits the largest tensor of a step by far. So losses are given hidden states and the head that
makes logits of them, take the rows that count, and never hold more logits than a chunk of rows has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug_core.model.decoder import Reduce


def full_precision(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 when it is half or bfloat16; float32 and float64 stay as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def token_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of each row, not reduced.

    Args:
        logits: [M, V] scores of the student.
        labels: [M] right token of each row, 0 <= label < V.
        teacher_logits: [M, V] scores of the teacher for the same rows; no gradient flows into them.
        alpha: share of the teacher's distribution in the target; 0 leaves the teacher out.
        label_smoothing: share of the hard target that is spread evenly over the vocabulary.

    Returns:
        [M] in nats: the cross-entropy with the target ``alpha * softmax(teacher) + (1 - alpha) * smoothed one-hot``.

    Raises:
        ValueError: ``alpha`` > 0 without ``teacher_logits``.
    """
    logits = full_precision(logits)
    if alpha == 0:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if teacher_logits is None:
        raise ValueError("alpha > 0 needs teacher_logits")
    target = full_precision(teacher_logits.detach()).to(logits.dtype).softmax(-1)
    target = target * alpha + (1 - alpha) * label_smoothing / logits.size(-1)
    hard = torch.full_like(target[:, :1], (1 - alpha) * (1 - label_smoothing))
    target.scatter_add_(1, labels.unsqueeze(1), hard)
    return F.cross_entropy(logits, target, reduction="none")


Head = Callable[[Tensor, Reduce], Tensor]
"""A language head on rows [M, W], reduced chunk by chunk: ``Decoder.logits`` or ``MplugModel.masked_logits``."""


def no_head(logits: Tensor, reduce: Reduce) -> Tensor:
    """For rows that are logits already."""
    return reduce(logits, slice(0, len(logits)))


def row_cross_entropy(
    rows: Tensor,
    labels: Tensor,
    *,
    head: Head = no_head,
    teacher_rows: Tensor | None = None,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`token_cross_entropy` [M] of the logits that heads make of rows, of a chunk of rows at a time.

    Args:
        rows, head: [M, W] hidden states and what makes logits of them; without a head they are logits.
        teacher_rows, teacher_head: the teacher's for the same rows; not looked at where ``alpha`` is 0.
        labels, alpha, label_smoothing: as in :func:`token_cross_entropy`.
    """

    def losses(logits: Tensor, part: slice) -> Tensor:
        teacher_logits = None
        if alpha > 0 and teacher_rows is not None:
            with torch.no_grad():
                taught = teacher_rows[part]
                teacher_logits = taught if teacher_head is None else teacher_head(taught)
        return token_cross_entropy(
            logits, labels[part], teacher_logits=teacher_logits, alpha=alpha, label_smoothing=label_smoothing
        )

    return head(rows, losses)
