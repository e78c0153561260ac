"""What all evaluations share: records in order, each image opened and encoded once per batch of images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from mplug_core.data.batches import Drawn, image_keys
from mplug_core.data.images import open_image, placed_transform
from mplug_core.data.placement import Placement
from mplug_core.data.records import Records
from mplug_core.errors import DataError, ImageError
from mplug_core.model.mplug import ImageEncoding
from mplug_core.tasks.task import Ready, Result


class Evaluation:
    """Iterate to get (encoding of some images, records with their rows in it); counts what had to be skipped.

    The records are as they were read: ``placements`` has, by row of the encoding yielded last, where each picture lies
    in the model's square.
    """

    def __init__(self, ready: Ready, records: Iterable[Any], batch_size: int = 32, limit: int | None = None) -> None:
        self.ready = ready
        self.records = list(records)[:limit]
        self.batch_size = batch_size
        self.skipped: list[str] = []
        self.seconds = 0.0
        if not self.records:
            raise DataError("nothing to evaluate: no records")
        vision = ready.config.vision
        self.transform = placed_transform(vision)
        self.placements: list[Placement] = []

    @property
    def n(self) -> int:
        """Records that were answered."""
        return len(self.records) - len(self.skipped)

    def result(
        self, task: str, records: Records[Any], metrics: dict[str, float], predictions: list[dict[str, Any]]
    ) -> Result:
        """The outcome; skipped is what was not answered here, and what the reader of ``records`` could not use."""
        skipped = len(self.skipped) + len(records.missing) + len(records.broken)
        return Result(task, self.n, skipped, metrics, self.seconds, predictions)

    def __iter__(self) -> Iterator[tuple[ImageEncoding, list[Drawn]]]:
        began = time.perf_counter()
        for chunk in self._chunks():
            found = self._encode(chunk)
            if found is not None:
                yield found
        self.seconds = time.perf_counter() - began
        if not self.n:
            raise DataError(f"none of the {len(self.records)} records has an image that can be read: {self.skipped[0]}")

    def _chunks(self) -> Iterator[list[Any]]:
        """Consecutive records on at most ``batch_size`` different images."""
        chunk: list[Any] = []
        images: set[Any] = set()
        for record in self.records:
            keys = image_keys(record)
            if chunk and len(images.union(keys)) > self.batch_size:
                yield chunk
                chunk, images = [], set()
            chunk.append(record)
            images.update(keys)
        yield chunk

    @torch.inference_mode()
    def _encode(self, records: list[Any]) -> tuple[ImageEncoding, list[Drawn]] | None:
        rows: dict[Any, int | str] = {}  # row of an image, or why it has none
        pixels: list[torch.Tensor] = []
        placements: list[Placement] = []
        drawn: list[Drawn] = []
        size = self.transform.size
        for record in records:
            for key in image_keys(record):
                if key not in rows:
                    try:
                        shown, placement = self.transform(open_image(key, target=size))
                        rows[key] = len(pixels)
                        pixels.append(shown)
                        placements.append(placement)
                    except ImageError as error:
                        rows[key] = str(error)
            places = tuple(rows[key] for key in image_keys(record))
            faults = [place for place in places if isinstance(place, str)]
            if faults:
                self.skipped.append(faults[0])
            else:
                drawn.append((places, record))
        if not drawn:
            return None
        self.placements = placements
        stacked = torch.stack(pixels).to(self.ready.device, self.ready.dtype)
        return self.ready.model.encode_image(stacked), drawn
