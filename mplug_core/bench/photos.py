"""Pictures that cost a decoder what photos do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def photo_like(seed: int, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Smooth shapes and fine noise: a JPEG of it has the size of a photo's (about 80 kB at 640 x 480)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 9, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, count: int, size: tuple[int, int] = (640, 480)) -> list[Path]:
    """``count`` JPEGs of ``size`` in pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05}.jpg" for number in range(count)]
    for number, file in enumerate(files):
        photo_like(number, size).save(file, quality=88)
    return files
