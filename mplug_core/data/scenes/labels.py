"""Dense labels per patch: what warms up a visual encoder before it is asked to speak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .world import WORLD, SceneObject, World


def patch_labels(
    objects: Sequence[SceneObject | Mapping[str, Any]],
    image_size: int | tuple[int, int],
    patch: int,
    curtain: Sequence[float] | None = None,
    world: World = WORLD,
) -> dict[str, np.ndarray]:
    """Labels of an image cut into patches of ``patch`` x ``patch`` pixels.

    ``objects``: entries of scenes.jsonl (``image_size`` is then that line's "size", boxes are in pixels) or
    :class:`SceneObject` (boxes in fractions). ``curtain``: its box in the same unit as the objects' boxes.

    Returns arrays over [rows, columns]: ``shape``, ``color``, ``size`` (int64; 0 is background, i + 1 the i-th name of
    the world), ``box`` (float32 [rows, columns, 4], x0 y0 x1 y1 in 0..1 of the image; zeros on background)
    and ``curtain`` (int64; 1 where the patch's centre is behind it). A patch belongs to the object whose box covers its
    centre, else to the one that overlaps it most if that is an eighth of the patch; each object has at least its best
    patch, unless another has more of it (which takes patches twice as large as the small objects).
    """
    width, height = (image_size, image_size) if isinstance(image_size, int) else image_size
    rows, columns = height // patch, width // patch
    names = {"shape": list(world.shapes), "color": list(world.colors), "size": list(world.sizes)}
    labels = {key: np.zeros((rows, columns), np.int64) for key in (*names, "curtain")}
    labels["box"] = np.zeros((rows, columns, 4), np.float32)
    scale = np.array([width, height, width, height], np.float32)
    x0 = np.arange(columns, dtype=np.float32) * patch
    y0 = np.arange(rows, dtype=np.float32)[:, None] * patch
    mid_x, mid_y = x0 + patch / 2, y0 + patch / 2
    if curtain is not None:
        unit = scale if objects and isinstance(objects[0], SceneObject) else 1
        left, top, right, bottom = np.asarray(curtain, np.float32) * unit
        behind = (mid_x >= left) & (mid_x < right) & (mid_y >= top) & (mid_y < bottom)
        labels["curtain"] = behind.astype(np.int64)
    if not objects:
        return labels
    things = [
        (o.shape, o.color, o.size, np.asarray(o.box, np.float32) * scale)
        if isinstance(o, SceneObject)
        else (o["shape"], o["color"], o["size"], np.asarray(o["box"], np.float32))
        for o in objects
    ]
    scores = []
    for *_, (left, top, right, bottom) in things:
        across = np.clip(np.minimum(x0 + patch, right) - np.maximum(x0, left), 0, None)
        down = np.clip(np.minimum(y0 + patch, bottom) - np.maximum(y0, top), 0, None)
        share = across * down / patch**2
        covers = (mid_x >= left) & (mid_x < right) & (mid_y >= top) & (mid_y < bottom)
        score = np.where(covers, 2 + share, np.where(share >= 1 / 8, share, 0))
        score.flat[share.argmax()] += 4
        scores.append(score)
    owner = np.argmax(scores, 0)
    taken = np.max(scores, 0) > 0
    for i, (shape, color, size, box) in enumerate(things):
        mine = taken & (owner == i)
        for key, name in (("shape", shape), ("color", color), ("size", size)):
            labels[key][mine] = names[key].index(name) + 1
        labels["box"][mine] = box / scale
    return labels
