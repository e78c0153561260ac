"""What all evaluations share: records in order, each image opened and encoded once per batch of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from mplug_core.data.batches import Drawn, image_keys
from mplug_core.data.images import open_image, picture_shape, placed_transform
from mplug_core.data.pictures import content_of
from mplug_core.data.placement import ON_ITS_SIDE, Placement, turn_of, turned
from mplug_core.data.records import Records
from mplug_core.errors import DataError, ImageError, NotFiniteError
from mplug_core.generation import Decoding, seed_of
from mplug_core.metrics.intervals import values
from mplug_core.model.mplug import ImageEncoding
from mplug_core.tasks.answering import MOSTLY_UNKNOWN, is_finite
from mplug_core.tasks.confidence import Evidence
from mplug_core.tasks.task import Ready, Result, mark_right

R = TypeVar("R")
_report: ContextVar[Callable[[int, int], None]] = ContextVar("report", default=lambda done, total: None)


@contextmanager
def reported(report: Callable[[int, int], None]) -> Iterator[None]:
    """Have evaluations inside the block call ``report(records done, records in all)``."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


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
        self.strange: list[str] = []
        self._shapes: dict[Any, tuple[tuple[int, int], int] | None] = {}
        self.answered: list[Any] = []
        self.seconds = 0.0
        if not self.records:
            raise DataError("nothing to evaluate: no records")
        vision = ready.config.vision
        self.transform = placed_transform(vision)
        self.placements: list[Placement] = []
        self.not_finite = 0
        self._pixels: list[torch.Tensor] = []

    @property
    def n(self) -> int:
        """Records that were answered."""
        return len(self.records) - len(self.skipped)

    def result(
        self, task: str, records: Records[Any], metrics: dict[str, float], predictions: list[dict[str, Any]]
    ) -> Result:
        """The outcome; skipped is what was not answered here, and what the reader of ``records`` could not use."""
        skipped = len(self.skipped) + len(records.missing) + len(records.broken)
        result = Result(task, self.n, skipped, metrics, self.seconds, predictions)
        result.records, result.source, result.not_finite = self.answered, records.source, self.not_finite
        if self.not_finite:
            result.notes.append(f"{self.not_finite} of {len(self.records)} records: {NotFiniteError.of('the answer')}")
        return result

    def scored(
        self, task: Any, records: Records[Any], predictions: list[dict[str, Any]], evidence: Evidence | None = None
    ) -> Result:
        """The outcome of predictions, one for each record that was answered, with the metrics that the task gives.

        ``evidence`` of the same answers is told how right they are.
        """
        right = mark_right(task, self.answered, predictions)
        asked = [getattr(record, task.text) for record in self.answered] if task.text else []
        unknown = sum(self.ready.unknown_share(text) >= MOSTLY_UNKNOWN for text in asked)
        measures, notes = task.score(self.answered, predictions, records.source)
        result = self.result(task.name, records, values(measures), predictions)
        result.measures, result.notes = measures, [*notes, *result.notes, *self._told()]
        if unknown:
            result.notes.append(f"{unknown} of {len(asked)} texts are half or more unknown to the model's vocabulary")
        if evidence is not None:
            result.evidence = evidence.judged(right)
        return result

    def _told(self) -> list[str]:
        """A note on boxes that are of other pictures."""
        if not self.strange:
            return []
        count = "1 box is" if len(self.strange) == 1 else f"{len(self.strange)} boxes are"
        return [f"{count} of another picture, first: {self.strange[0]}"]

    def as_stated(self, record: Any, box: Sequence[float]) -> Sequence[float]:
        """A box of a phrase's picture as it is shown, as a box of the picture of the size that its file states."""
        turn = turn_of(record.size, self._shape(record.image))
        return turned(box, ON_ITS_SIDE.get(turn, 1))

    def _shape(self, image: Any) -> tuple[tuple[int, int], int] | None:
        if image not in self._shapes:
            self._shapes[image] = picture_shape(image)
        return self._shapes[image]

    def __iter__(self) -> Iterator[tuple[ImageEncoding, list[Drawn]]]:
        began = time.perf_counter()
        report, done = _report.get(), 0
        for chunk in self._chunks():
            report(done, len(self.records))
            found = self._encode(chunk)
            if found is not None:
                self.answered += [record for _, record in found[1]]
                yield found
            done += len(chunk)
        report(done, len(self.records))
        self.seconds = time.perf_counter() - began
        if not self.n:
            if self.not_finite:
                count = len(self.records)
                raise NotFiniteError.of(f"of none of the {count} records an answer can be given: the answer")
            raise DataError(f"none of the {len(self.records)} records has an image that can be read: {self.skipped[0]}")

    def sound(self, drawn: Sequence[Drawn], results: Sequence[R]) -> list[tuple[Drawn, R]]:
        """The records that were yielded last with their results, without those whose result is not a number: these
        are skipped."""
        pairs = list(zip(drawn, results, strict=True))
        kept = [pair for pair in pairs if is_finite(pair[1])]
        if len(kept) < len(pairs):
            lost = len(pairs) - len(kept)
            self.not_finite += lost
            self.skipped += [str(NotFiniteError.of("the answer"))] * lost
            del self.answered[len(self.answered) - len(pairs) :]
            self.answered += [record for (_, record), _ in kept]
        return kept

    def seeds(
        self, decoding: Decoding, seed: int, rows: Sequence[int], texts: Sequence[str] | None = None
    ) -> list[int] | None:
        """The seeds of draws on images of the encoding yielded last, for a text each where there are texts; None where
        nothing is drawn."""
        if decoding.strategy != "sample":
            return None
        contents = {row: content_of(self._pixels[row]) for row in set(rows)}
        return [seed_of(seed, contents[row], text) for row, text in zip(rows, texts or [""] * len(rows), strict=True)]

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
            if not faults and getattr(record, "size", None):
                try:
                    turn_of(record.size, self._shape(record.image))
                except DataError as error:
                    faults = [f"{record.image}: {error.message}"]
                    self.strange += faults
            if faults:
                self.skipped.append(faults[0])
            else:
                drawn.append((places, record))
        if not drawn:
            return None
        self.placements, self._pixels = placements, pixels
        stacked = torch.stack(pixels).to(self.ready.device, self.ready.dtype)
        return self.ready.model.encode_image(stacked), drawn
