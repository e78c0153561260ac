"""Visual features of a frozen backbone, computed once: a few views of each image, on disk, read by memory map."""

from __future__ import annotations

import hashlib
import os
import random
import socket
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch

from mplug_core.data.batches import Source
from mplug_core.errors import DataError, ImageError
from mplug_core.model.mplug import MplugModel


def cache_features(
    source: Source, model: MplugModel, folder: Path, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Features [views, images, N, C] float16 of the source's images, and where each picture lies: [views, images, 4].

    Computed if the files are not there; the second are the numbers of a :class:`~mplug_core.data.placement.Placement`.
    View 0 is the plain image, the others are augmented as the source says. DataError if an image can't be read.
    """
    views = source.section.cached_views
    names = "\n".join(f"{image} {_stamp(image)}" for image in source.images)
    # buffers, too: the statistics of batch norms
    weights = [float(t.detach().double().abs().sum()) for t in (*model.visual.parameters(), *model.visual.buffers())]
    boxes = [source.targets(image) for image in range(len(source.images))]  # which crops are made around
    tasks = sorted(source.section.tasks)  # they decide whether crops are, and which augmentations
    settings = f"{source.section.augment}{source.section.crop_scale}{source.vision}{sum(weights):.6e}{views}{boxes}"
    key = hashlib.sha256(f"{names}{settings}{tasks}".encode()).hexdigest()[:16]
    file, places = (folder / f"{source.name}-{key}{ending}.npy" for ending in ("", "-placements"))
    if file.exists() and places.exists():
        return np.load(file, mmap_mode="r"), np.load(places)
    folder.mkdir(parents=True, exist_ok=True)
    # processes of one run may compute the same file at once: each writes its own
    beside = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    visual = model.visual.eval()
    cells = visual.grid[0] * visual.grid[1] + int(visual.is_transformer)
    shape = (views, len(source.images), cells, visual.width)
    array = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float16, shape=shape)
    placements = np.zeros((*shape[:2], 4))
    rng = random.Random(source.name)
    with torch.inference_mode():
        for view in range(views):
            for start in range(0, shape[1], batch_size):
                chunk = range(start, min(start + batch_size, shape[1]))
                try:
                    loaded = [source.load(image, rng if view else None) for image in chunk]
                except ImageError as error:
                    raise DataError(f"source {source.name}: {error}", "remove the image or its record") from error
                pixels = torch.stack([pixels for pixels, _ in loaded])
                features = visual(pixels.to(next(visual.parameters())))
                array[view, chunk.start : chunk.stop] = features.float().cpu().numpy()
                placements[view, chunk.start : chunk.stop] = [astuple(placement) for _, placement in loaded]
    array.flush()
    del array
    with open(f"{beside}-placements", "wb") as part:
        np.save(part, placements)
    os.replace(part.name, places)
    # the features come last: where they are, everything is
    os.replace(beside, file)
    return np.load(file, mmap_mode="r"), placements


def _stamp(image: Path) -> str:
    """Size and time of change of a file: another picture may come under the same name. Nothing for one not there."""
    try:
        status = os.stat(image)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"
