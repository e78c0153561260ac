"""Boxes as four tokens (cx, cy, w, h), and their loss.

A coordinate v in 0..1 is the bin floor(v * (bins - 1)), so that v = 1 has a bin of its own and bin b stands for
b / (bins - 1). Boxes outside are corner boxes (x0, y0, x1, y1) as fractions of the image's width and height.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mplug_core.objectives.cross_entropy import full_precision, token_cross_entropy


def box_to_bins(box: Tensor, bins: int) -> Tensor:
    """Corner boxes [..., 4] in 0..1 to int64 bins [..., 4] of cx, cy, w, h, each 0..bins-1.

    Values are clamped, and a NaN is 0: what is no box has no meaning here, but never makes an index of nowhere.
    """
    x0, y0, x1, y1 = full_precision(box).nan_to_num(0.0).unbind(-1)
    values = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
    return (values.clamp(0, 1) * (bins - 1)).floor().long()


def bins_to_box(indices: Tensor, bins: int, offset: float = 0.0) -> Tensor:
    """Bins [..., 4] of cx, cy, w, h to corner boxes [..., 4], float32, cut at the image's border.

    ``offset`` says where in its bin a value is taken to be: 0 at the lower edge, as the released models do, 0.5 in the
    middle, which removes the half-bin bias and matters when bins are coarse.
    """
    cx, cy, w, h = _values(indices, bins, offset).unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1).clamp(0, 1)


def _values(indices: Tensor, bins: int, offset: float = 0.0) -> Tensor:
    return ((indices.float() + offset) / max(bins - 1, 1)).clamp(0, 1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of corner boxes [..., 4] and [..., 4], element by element (broadcasting) -> [...]."""
    return _overlap(a, b)[0]


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU less the share of the smallest enclosing box that neither covers, in -1..1, element by element -> [...]."""
    iou, union = _overlap(a, b)
    hull = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return iou - (hull - union) / hull.clamp(min=torch.finfo(hull.dtype).eps)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shared = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).eps), union


def box_token_loss(
    logits: Tensor,
    target_bins: Tensor,
    box_ids: Tensor,
    *,
    base: float = 0.0,
    l1: float = 1.0,
    giou: float = 1.0,
) -> Tensor:
    """Mean over samples of the four tokens' mean NLL, weighted by how wrong the sample's greedy box is.

    The weight of a sample is ``base + l1 * L1 + giou * (1 - GIoU)``, without gradient: L1 is the sum of the four
    absolute differences in cx, cy, w, h (0..4), GIoU compares the corner boxes, and the greedy box is the most probable
    bin of each position under teacher forcing. Each weight meets the NLL of its own sample alone. With ``base`` = 0 a
    sample whose four bins are right has weight zero; a ``base`` of 1 keeps it in training.

    Args:
        logits: [B, 4, V] at the positions that predict cx, cy, w, h.
        target_bins: [B, 4] from :func:`box_to_bins`.
        box_ids: [bins] token id of each bin. The softmax runs over these tokens alone, as decoding does.

    Returns:
        Scalar; a zero that keeps the graph for an empty batch.
    """
    scores = full_precision(logits[..., box_ids])
    bins = scores.size(-1)
    with torch.no_grad():
        greedy = scores.argmax(-1)
        distance = (_values(greedy, bins) - _values(target_bins, bins)).abs().sum(-1)
        overlap = generalized_box_iou(bins_to_box(greedy, bins), bins_to_box(target_bins, bins))
        weight = (base + l1 * distance + giou * (1 - overlap)).to(scores)
    nll = token_cross_entropy(scores.flatten(0, 1), target_bins.flatten()).view(-1, 4).mean(1)
    return (weight * nll).sum() / max(len(nll), 1)
