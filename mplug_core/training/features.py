"""Visual features of a frozen backbone, computed once: a few views of each image, on disk, read by memory map."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import torch

from mplug_core.data.batches import Source
from mplug_core.errors import DataError, ImageError
from mplug_core.model.mplug import Mplug


def cache_features(source: Source, model: Mplug, folder: Path, batch_size: int = 32) -> np.ndarray:
    """[views, images, N, C] float16 for the source's images; computed if the file is not there.

    View 0 is the plain image, the others are augmented as the source says. DataError if an image can't be read.
    """
    views = source.section.cached_views
    names = "\n".join(str(image) for image in source.images)
    weights = sum(float(p.double().abs().sum()) for p in model.visual.parameters())
    settings = f"{source.section.augment}{source.section.crop_scale}{source.vision}{weights:.6e}{views}"
    key = hashlib.sha256(f"{names}{settings}".encode()).hexdigest()[:16]
    file = folder / f"{source.name}-{key}.npy"
    if file.exists():
        return np.load(file, mmap_mode="r")
    folder.mkdir(parents=True, exist_ok=True)
    # processes of one run may compute the same file at once: each writes its own
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    visual = model.visual.eval()
    cells = visual.grid[0] * visual.grid[1] + int(visual.is_transformer)
    shape = (views, len(source.images), cells, visual.width)
    array = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float16, shape=shape)
    rng = random.Random(source.name)
    with torch.inference_mode():
        for view in range(views):
            for start in range(0, shape[1], batch_size):
                chunk = source.images[start : start + batch_size]
                try:
                    pixels = torch.stack([source.load(image, rng if view else None) for image in chunk])
                except ImageError as error:
                    raise DataError(f"source {source.name}: {error}", "remove the image or its record") from error
                features = visual(pixels.to(next(visual.parameters())))
                array[view, start : start + len(chunk)] = features.float().cpu().numpy()
    array.flush()
    del array
    os.replace(beside, file)
    return np.load(file, mmap_mode="r")
