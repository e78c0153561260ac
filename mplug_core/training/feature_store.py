"""Visual features on disk, in one byte a number: a folder for each way to see an image, shared by all sources.

A folder holds chunks, two files each: the features, read by memory map, and an index of whose they are. A chunk is
complete or absent, so that what was computed before an interruption stays, and an image that is there is not computed
again, whichever source asks for it.

Each channel of an image has 256 steps between its lowest and its highest value. On 96 photos of Flickr8k and COCO the
tokens' relative error is 0.2 % (EfficientNet-lite0) and 0.5 % (with levels 2 and 3); in fp16 it is 0.02 %, in bf16 0.15
and 0.17 %. The cosine of two photos' pooled features, less the mean photo's, changes by 8e-6 on average, 4e-5 at most,
as in fp16 (in bf16: 6e-5, 3e-4).
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mplug_core.atomic import sync_file
from mplug_core.errors import CheckpointError

INDEX = ".index.npy"
HIGHEST = 255


class FeatureStore:
    """The features [N, C] of one view of images, by key, with where the picture lies in it."""

    def __init__(self, folder: Path, cells: int, channels: int) -> None:
        self.folder, self.cells, self.channels = folder, cells, channels
        self.known: dict[bytes, tuple[np.ndarray, int]] = {}
        """Chunk and row of each image."""
        self.placements: dict[bytes, np.ndarray] = {}
        self._read: set[str] = set()
        self.refresh()

    @property
    def layout(self) -> np.dtype:
        """A row of a chunk: value = low + step * cell, for each channel."""
        per_channel = ("<f2", (self.channels,))
        return np.dtype([("low", *per_channel), ("step", *per_channel), ("cells", "u1", (self.cells, self.channels))])

    @property
    def image_bytes(self) -> int:
        """What an image takes on disk."""
        return self.layout.itemsize + INDEX_LAYOUT.itemsize

    def refresh(self) -> None:
        """Look for chunks that have come, also from other processes. A damaged one is passed over."""
        for index in sorted(self.folder.glob(f"[!.]*{INDEX}")):
            if index.name in self._read:
                continue
            try:
                entries = np.load(index)
                chunk = np.load(index.with_name(index.name.removesuffix(INDEX) + ".npy"), mmap_mode="r")
            except (OSError, ValueError, EOFError):
                continue
            if entries.dtype == INDEX_LAYOUT and chunk.dtype == self.layout and len(entries) == len(chunk):
                self._take(index.name, entries, chunk)

    def _take(self, name: str, entries: np.ndarray, chunk: np.ndarray) -> None:
        self._read.add(name)
        for row, entry in enumerate(entries):
            key = entry["key"].tobytes()
            self.known[key] = (chunk, row)
            self.placements[key] = entry["placement"]

    def add(self, keys: Sequence[bytes], rows: np.ndarray, placements: Sequence[Sequence[float]]) -> None:
        """Write a chunk of :func:`quantise`'s rows."""
        entries = np.zeros(len(keys), INDEX_LAYOUT)
        entries["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        entries["placement"] = placements
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        # the index comes last: where it is, everything is
        for file, values in ((f"{name}.npy", rows), (name + INDEX, entries)):
            # processes of one run may write the same file at once
            beside = self.folder / f".{file}.{socket.gethostname()}.{os.getpid()}"
            try:
                with open(beside, "wb") as stream:
                    np.save(stream, values)
                sync_file(beside)
                os.replace(beside, self.folder / file)
            finally:
                beside.unlink(missing_ok=True)
        self._take(name + INDEX, entries, np.load(self.folder / f"{name}.npy", mmap_mode="r"))

    def __contains__(self, key: bytes) -> bool:
        return key in self.known

    def __getitem__(self, key: bytes) -> np.void:
        """The row of an image, on disk."""
        chunk, row = self.known[key]
        return chunk[row]


INDEX_LAYOUT = np.dtype([("key", "u1", (16,)), ("placement", "<f8", (4,))])


def quantise(features: Tensor, layout: np.dtype) -> np.ndarray:
    """Rows of a chunk from features [B, N, C]; CheckpointError where they are not finite."""
    features = features.float()
    low, high = features.amin(1).to(torch.float16), features.amax(1).to(torch.float16)
    step = ((high.float() - low.float()) / HIGHEST).to(torch.float16)
    if not (low.isfinite() & high.isfinite()).all():
        raise CheckpointError("the visual encoder gives features that are not finite", "start from other weights")
    # a channel that hardly changes has a step of 0
    scale = 1 / step.float().where(step > 0, 1)
    rows = np.zeros(len(features), layout)
    rows["low"], rows["step"] = low.cpu().numpy(), step.cpu().numpy()
    for row, values in enumerate(features):  # one at a time: it stays in the processor's cache
        cells = (values - low[row].float()).mul_(scale[row]).round_().clamp_(0, HIGHEST)
        rows["cells"][row] = cells.to(torch.uint8).cpu().numpy()
    return rows


class StoredFeatures:
    """The features of a source's images in all views: what :attr:`mplug_core.data.batches.Source.features` reads."""

    def __init__(self, stores: Sequence[FeatureStore], keys: Sequence[Sequence[bytes]]) -> None:
        """A store for each view, and in it the key of each image."""
        self.stores, self.keys = list(stores), keys

    def __len__(self) -> int:
        return len(self.stores)

    def read(self, views: Sequence[int], images: Sequence[int]) -> Tensor:
        """[B, N, C] float32 of these images in these views."""
        first = self.stores[0]
        features = torch.empty(len(images), first.cells, first.channels)
        for values, view, image in zip(features, views, images, strict=True):
            stored = self.stores[view][self.keys[view][image]]
            # one at a time: it stays in the processor's cache
            np.multiply(stored["cells"], stored["step"].astype(np.float32), out=values.numpy())
            values += torch.from_numpy(stored["low"].astype(np.float32))
        return features

    def placements(self) -> np.ndarray:
        """Where the pictures lie in their views: [views, images, 4]."""
        return np.array([list(self._placements(view)) for view in range(len(self))])

    def _placements(self, view: int) -> Iterator[np.ndarray]:
        store = self.stores[view]
        return (store.placements[key] for key in self.keys[view])
