"""Scores of visual grounding: how often a box is right, at an overlap of one half or more, and how well it fits."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from mplug_core.metrics.intervals import Measure, clusters_of, mean, means_by_kind, values
from mplug_core.objectives.box import box_iou

RIGHT = 0.5
"""The overlap (IoU) from which on a box counts as right, as in RefCOCO's published results."""


def score_boxes(found: Tensor, truth: Tensor) -> dict[str, float]:
    """``accuracy_iou50`` and the mean ``iou`` of corner boxes [n, 4], both in the same coordinates; n is at least 1.

    A box that is not finite is wrong.
    """
    return values(box_measures(found, truth, range(len(truth))))


def right_boxes(found: Tensor, truth: Tensor) -> list[bool]:
    """Which of corner boxes [n, 4] overlap the true ones enough."""
    return (torch.nan_to_num(box_iou(found.double(), truth.double())) >= RIGHT).tolist()


def box_measures(
    found: Tensor, truth: Tensor, images: Sequence[Hashable], kinds: Sequence[str] | None = None
) -> dict[str, Measure]:
    """The metrics of :func:`score_boxes` as sums over boxes, those on one image a cluster; with ``kinds`` also
    ``accuracy_iou50_KIND`` of those of a kind."""
    overlaps = torch.nan_to_num(box_iou(found.double(), truth.double())).numpy()
    clusters = clusters_of(images)
    right = means_by_kind("accuracy_iou50", clusters, (overlaps >= RIGHT).tolist(), kinds or [""] * len(clusters))
    return right | {"iou": mean(clusters, overlaps)}
