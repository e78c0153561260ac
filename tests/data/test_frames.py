"""Frames of a clip: evenly spread, and from its whole length."""

from __future__ import annotations

import pytest

from mplug_core.data.frames import uniform_frames


@pytest.mark.parametrize(
    ("total", "count", "frames"),
    [(8, 4, [0, 2, 4, 6]), (20, 8, [0, 2, 5, 7, 10, 12, 15, 17]), (5, 5, [0, 1, 2, 3, 4]), (3, 8, [0, 1, 2])],
)
def test_by_hand(total: int, count: int, frames: list[int]) -> None:
    assert uniform_frames(total, count) == frames


@pytest.mark.parametrize("total", [9, 31, 100, 131])
def test_the_end_is_seen(total: int) -> None:
    frames = uniform_frames(total, 8)
    gaps = [b - a for a, b in zip(frames, [*frames[1:], total], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="positive"):
        uniform_frames(0, 4)
