"""Scores of boxes, by hand."""

from __future__ import annotations

import pytest
import torch

from mplug_core.metrics.grounding import score_boxes


def test_by_hand() -> None:
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 4)
    found = torch.tensor(
        [
            [0.0, 0.0, 0.5, 0.5],  # 1
            [0.0, 0.0, 1.0, 0.5],  # exactly one half counts as right
            [0.25, 0.0, 0.75, 0.5],  # 1/3
            [0.5, 0.5, 1.0, 1.0],  # 0
        ]
    )
    assert score_boxes(found, truth) == {
        "accuracy_iou50": pytest.approx(0.5),
        "iou": pytest.approx((1 + 0.5 + 1 / 3) / 4),
    }


def test_no_box_is_wrong_and_spoils_nothing() -> None:
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 3)
    found = torch.tensor([[float("nan")] * 4, [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.5, 0.5]])
    assert score_boxes(found, truth) == {"accuracy_iou50": pytest.approx(1 / 3), "iou": pytest.approx(1 / 3)}
