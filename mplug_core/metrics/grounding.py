"""Scores of visual grounding: how often a box is right, at an overlap of one half or more, and how well it fits."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug_core.objectives.box import box_iou

RIGHT = 0.5
"""The overlap (IoU) from which on a box counts as right, as in RefCOCO's published results."""


def score_boxes(found: Tensor, truth: Tensor) -> dict[str, float]:
    """``accuracy_iou50`` and the mean ``iou`` of corner boxes [n, 4], both in the same coordinates; n is at least 1.

    A box that is not finite is wrong.
    """
    overlaps = torch.nan_to_num(box_iou(found.double(), truth.double()))
    return {
        "accuracy_iou50": (overlaps >= RIGHT).double().mean().item(),
        "iou": overlaps.mean().item(),
    }
