"""Which frames of a clip a model sees (paper section 4.5: zero-shot transfer to video)."""

from __future__ import annotations


def uniform_frames(total: int, count: int) -> list[int]:
    """Indices of ``count`` frames, evenly spread over a clip of ``total`` frames; all of them if it has fewer.

    The clip is cut into ``count`` equal parts and the first frame of each is taken, so the last part is seen as well.
    ValueError unless both are positive.
    """
    if total < 1 or count < 1:
        raise ValueError(f"{count} frames of {total}: both must be positive")
    if total <= count:
        return list(range(total))
    return [part * total // count for part in range(count)]
