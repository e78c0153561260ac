"""Visual features of a frozen backbone, computed once: a few views of each image, whichever sources name it."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mplug_core.cpu import usable_cores
from mplug_core.data.ahead import batches_ahead
from mplug_core.data.batches import Source
from mplug_core.errors import DataError, ImageError
from mplug_core.model.vision import VisualEncoder
from mplug_core.training.distributed import ALONE, World
from mplug_core.training.feature_store import FeatureStore, StoredFeatures, quantise

BATCH = 32
"""Images that the encoder sees at once."""
CHUNK = 8 * BATCH
"""Images that are written at once; an interruption loses fewer."""
TELL_SECONDS = 1.0
EDGE = 1 << 16
"""Bytes of a file's beginning and end that tell it apart from others."""

Watch = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class View:
    """One image as it is to be seen: the first source that names it, its number there and the number of the view."""

    source: Source
    image: int
    view: int
    key: bytes

    def load(self) -> tuple[torch.Tensor, Any]:
        """Its pixels and placement, the same at every call and for every source. DataError if it can't be read."""
        rng = random.Random(self.key + self.view.to_bytes(4, "big")) if self.view else None
        try:
            return self.source.load(self.image, rng)
        except ImageError as error:
            raise DataError(f"source {self.source.name}: {error}", "remove the image or its record") from error


class FeatureCache:
    """The features of all sources, in folders below ``folder`` by encoder and kind of view."""

    def __init__(self, visual: VisualEncoder, sources: Iterable[Source], folder: Path) -> None:
        """Sources without ``cached_views`` are left out."""
        self.visual, self.folder = visual, folder
        self.sources = [s for s in sources if s.section.cached_views and not s.section.text_only]
        self.encoder = fingerprint(visual) if self.sources else ""
        self.stores: dict[str, FeatureStore] = {}
        self.keys = {
            source.name: [
                [image_key(source, image, view) for image in range(len(source.images))]
                for view in range(source.section.cached_views)
            ]
            for source in self.sources
        }

    def store(self, source: Source, view: int) -> FeatureStore:
        """Where a view of the source's images is kept."""
        settings = f"{self.encoder} {source.vision} {source.view_settings(view)}"
        name = hashlib.sha256(settings.encode()).hexdigest()[:16]
        if name not in self.stores:
            self.stores[name] = FeatureStore(self.folder / name, *shape_of(self.visual))
        return self.stores[name]

    def views(self) -> dict[FeatureStore, list[View]]:
        """Every view of every image once, by the store that it belongs in."""
        found: dict[FeatureStore, dict[bytes, View]] = {}
        for source in self.sources:
            for view, keys in enumerate(self.keys[source.name]):
                known = found.setdefault(self.store(source, view), {})
                for image, key in enumerate(keys):
                    # what is plain is plain in every view
                    number = view if source.view_settings(view) != source.view_settings(0) else 0
                    known.setdefault(key, View(source, image, number, key))
        return {store: list(views.values()) for store, views in found.items()}

    def compute(self, watch: Watch = lambda kind, figures: None, world: World = ALONE) -> None:
        """Compute what is not there, each process its share of it. DataError if an image can't be read."""
        parts: list[tuple[FeatureStore, list[View]]] = []
        for store, views in self.views().items():
            size = max(1, min(CHUNK, -(-len(views) // world.size)))
            # of all views, not of those that are missing: other processes may have begun
            shares = [views[start : start + size] for start in range(0, len(views), size)][world.rank :: world.size]
            missing = [[view for view in share if view.key not in store] for share in shares]
            parts += [(store, share) for share in missing if share]
        total = sum(len(share) for _, share in parts)
        if not total:
            return
        wanted = sum(map(len, self.views().values()))
        shown = f"{total} of {wanted}" if total < wanted else f"{total}"
        watch("note", {"text": f"features of {shown} views of images are computed"})
        progress = Progress(watch, total)
        was_training, device = self.visual.training, next(self.visual.parameters()).device
        self.visual.eval().to(world.device)
        try:
            self._compute(parts, progress)
        finally:
            self.visual.train(was_training).to(device)
        progress.end()

    @torch.inference_mode()
    def _compute(self, parts: list[tuple[FeatureStore, list[View]]], progress: Progress) -> None:
        everything = (view for _, views in parts for view in views)
        with closing(batches_ahead(everything, View.load, BATCH, usable_cores())) as ahead:
            # no batch ends early for what is not read yet: features must not depend on how fast the disk is
            opened = (pair for batch in ahead for pair in batch)
            for store, views in parts:
                rows, placements = [], []
                for start in range(0, len(views), BATCH):
                    loaded = list(_results(itertools.islice(opened, len(views[start : start + BATCH]))))
                    pixels = torch.stack([pixels for pixels, _ in loaded])
                    features = self.visual(pixels.to(next(self.visual.parameters())))
                    rows.append(quantise(features, store.layout))
                    placements += [astuple(placement) for _, placement in loaded]
                    progress.add(len(loaded))
                store.add([view.key for view in views], np.concatenate(rows), placements)

    def refresh(self) -> None:
        """Look for what other processes have computed."""
        for store in self.stores.values():
            store.refresh()

    def give(self) -> None:
        """Have the sources read their features here."""
        for source in self.sources:
            stores = [self.store(source, view) for view in range(source.section.cached_views)]
            features = StoredFeatures(stores, self.keys[source.name])
            source.features, source.placements = features, features.placements()

    def bytes_needed(self) -> int:
        """What all features take on disk."""
        return sum(store.image_bytes * len(views) for store, views in self.views().items())


class Progress:
    """Tells how far a computation of features is, about once a second; ``what``: images, or captions."""

    def __init__(self, watch: Watch, total: int, what: str = "images") -> None:
        self.watch, self.total, self.what, self.done = watch, total, what, 0
        self.began = self.told = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.told >= TELL_SECONDS:
            self._tell()

    def end(self) -> None:
        self._tell()

    def _tell(self) -> None:
        now = self.told = time.monotonic()
        speed = self.done / max(now - self.began, 1e-9)
        figures = {
            "of": self.what, "done": self.done, "total": self.total, f"{self.what}_per_second": speed,
            "seconds": now - self.began, "eta_seconds": (self.total - self.done) / speed,
        }  # fmt: skip
        self.watch("features", figures)


def _results(pairs: Iterator[tuple[View, Any]]) -> Iterator[Any]:
    for _, result in pairs:
        if isinstance(result, Exception):
            raise result
        yield result


def shape_of(visual: VisualEncoder) -> tuple[int, int]:
    """Tokens of an image and channels of a token."""
    return visual.grid[0] * visual.grid[1] + int(visual.is_transformer), visual.width


def fingerprint(visual: VisualEncoder) -> str:
    """What tells encoders apart: all weights, also the statistics of batch norms."""
    digest = hashlib.sha256()
    for name, value in visual.state_dict().items():
        digest.update(name.encode())
        if value.device.type != "meta":  # which has shapes alone
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def image_key(source: Source, image: int, view: int) -> bytes:
    """What tells that two sources mean the same view: the picture, and the boxes that the view is cropped around."""
    boxes = source.crop_targets(image) if source.view_settings(view) != source.view_settings(0) else None
    return hashlib.sha256(content(source.images[image]) + str(boxes).encode()).digest()[:16]


def content(image: Path) -> bytes:
    """What tells pictures apart, wherever they lie: the file's size, beginning and end. Its name if it is not there."""
    try:
        status = os.stat(image)
        return _edges(image, status.st_size, status.st_mtime_ns)
    except OSError:
        return str(image).encode()


@lru_cache(maxsize=1 << 20)
def _edges(image: Path, size: int, changed: int) -> bytes:
    digest = hashlib.sha256(str(size).encode())
    with open(image, "rb") as stream:
        for place in (0, max(EDGE, size - EDGE)):
            stream.seek(place)
            digest.update(stream.read(EDGE))
    return digest.digest()
