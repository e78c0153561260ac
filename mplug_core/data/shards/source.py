"""A pack as a source of batches: records are read with their images and forgotten; only the index is held."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from mplug_core.data.batches import ATTEMPTS, Batch, Encode, NothingReadable, Source
from mplug_core.data.records.types import KINDS
from mplug_core.data.shards.order import Order
from mplug_core.data.shards.reading import Pack
from mplug_core.data.shards.remote import Unreachable
from mplug_core.data.shards.samples import DamagedSample
from mplug_core.errors import DataError
from mplug_core.recipe import SourceSection, VisionSection

_ENOUGH = 10_000
"""Samples that are looked at before a share of bad ones is trusted, unless the pack has less."""


class ShardSource(Source):
    """One pack of the mix. Its batches are determined by (seed, lot) and the size of the global batch."""

    def __init__(
        self,
        name: str,
        section: SourceSection,
        pack: Pack,
        vision: VisionSection,
        encoders: Mapping[str, Encode],
        lots: int = 1,
        max_bad_fraction: float = 0.01,
    ) -> None:
        """``lots``: those of a global batch, processes times accumulation (see :mod:`~mplug_core.data.shards.order`).

        DataError where the pack lacks what a task needs, or where more of a local pack is damaged than may be bad.
        """
        self.name, self.section, self.vision, self.encoders = name, section, vision, encoders
        self.features = self.placements = self.aligned = None
        self.pack, self.max_bad_fraction = pack, max_bad_fraction
        for task in section.tasks:
            if task not in KINDS:
                raise DataError(f"source {name}: task {task} needs generated scenes, a pack has none", "leave it out")
            pack.index.require(KINDS[task], task, f"source {name}: {pack.name}")
        if pack.index.text_only:
            raise DataError(f"source {name}: {pack.name} has no images", "set text_only: true")
        self.per_sample = max(1, pack.index.per_sample)
        self.order = Order(pack.counts, self.samples_per_lot() * lots, section.lanes, section.shuffle_window)
        # of the samples of the batch at hand
        self.by_image: dict[int, dict[str, list[tuple[tuple[int, ...], Any]]]] = {}  # type: ignore[assignment]
        self.images: dict[int, bytes] = {}  # type: ignore[assignment]
        self.names: dict[int, str] = {}
        self._drawn = 0
        self._strange = []
        self._bad: set[str] = set()
        self._damaged: dict[int, Unreachable] = {}
        for number, error in () if pack.fetched else pack.faults():
            self._note_damaged(number, error)

    def can_be_cut(self, pieces: int) -> bool:
        whole = max(1, pieces * self.section.batch_size // self.per_sample)
        return self.samples_per_lot() * pieces == whole

    def samples_per_lot(self) -> int:
        """How many samples make ``batch_size`` images."""
        return max(1, self.section.batch_size // self.per_sample)

    def steps_per_epoch(self, world: int) -> int:
        """Steps in which every sample is drawn once, but for a tail of less than a global batch."""
        return max(1, self.order.epoch_length // (self.samples_per_lot() * world))

    def draw(self, seed: int, lot: int) -> Batch:
        """The batch of a lot; DataError once more is bad than may be."""
        rng = random.Random(f"{seed}/{self.name}/{lot}")
        size = self.samples_per_lot()
        places = range(lot * size, (lot + 1) * size)
        if self.pack.fetched:
            self.pack.ahead([shard for shard in self.order.ahead(seed, places) if shard not in self._damaged])
        bad: list[str] = []
        batch = None
        for attempt in range(ATTEMPTS):
            chosen, lost = self._take([self.order.sample(seed, place) for place in places])
            bad += lost
            batch = None
            if chosen:
                try:
                    batch = self.batch(chosen, rng)
                except NothingReadable as error:
                    bad += error.bad
                else:
                    bad += batch.bad
                    if batch.blocks:
                        break
            # others take their place, from where the same process reads anyway
            places = [place + self.order.batch * 2**attempt for place in range(lot * size, (lot + 1) * size)]
        self._note_bad(bad)
        if batch is None or (bad and not batch.blocks):
            raise NothingReadable(self.name, bad)
        batch.bad = bad
        return batch

    def shown(self, image: int) -> str:
        """The shard and key of an image, and what it was called."""
        return self.names[image]

    def _take(self, samples: list[tuple[int, int]]) -> tuple[list[int], list[str]]:
        """Read these samples; the numbers of their images, and a line for each sample that can't be used."""
        self.by_image, self.images, self.names = {}, {}, {}
        self._settled = set()
        bad = []
        self._drawn += len(samples)
        for shard, number in samples:
            try:
                if shard in self._damaged:
                    raise self._damaged[shard]
                sample = self.pack.shard(shard).read(number)
            except Unreachable as error:
                self._note_damaged(shard, error)
                bad.append(f"{self.pack.shards[shard].name} sample {number}: {error.code}: {error.message}")
                continue
            except DamagedSample as error:
                bad.append(f"{self.pack.shards[shard].name} sample {number}: {error.code}: {error.message}")
                continue
            first = (self.pack.shards[shard].first + number) * self.per_sample
            for row, (data, name) in enumerate(zip(sample.images, sample.names, strict=True)):
                self.by_image[first + row] = {}
                self.images[first + row] = data
                self.names[first + row] = f"{self.pack.shards[shard].name} sample {number} ({name})"
            for task in self.section.tasks:
                for rows, record in sample.records.get(KINDS[task], ()):
                    if rows:
                        ids = tuple(first + row for row in rows)
                        self.by_image[ids[0]].setdefault(task, []).append((ids, record))
        return list(self.images), bad

    def _note_damaged(self, shard: int, error: Unreachable) -> None:
        """A shard whose samples are all bad; DataError where those are more than may be."""
        self._damaged[shard] = error
        lost = sum(self.pack.counts[number] for number in self._damaged)
        if lost > self.max_bad_fraction * len(self.pack):
            first = next(iter(self._damaged.values()))
            raise DataError(
                f"source {self.name}: {len(self._damaged)} of {len(self.pack.counts)} shards are damaged, "
                f"{lost:,} samples; first: {first.message}",
                "repair them or raise data.max_bad_fraction",
            )

    def _note_bad(self, bad: list[str]) -> None:
        """DataError where more single samples were bad, of those that this process has drawn, than may be."""
        alone = [line for line in bad if f": {Unreachable.default_code}: " not in line]
        self._bad.update(alone)
        looked_at = max(min(self._drawn, len(self.pack)), min(len(self.pack), _ENOUGH))
        if alone and len(self._bad) > self.max_bad_fraction * looked_at:
            raise DataError(
                f"source {self.name}: {len(self._bad)} bad samples of {looked_at:,}, one of them: {alone[0]}",
                "repair the pack or raise data.max_bad_fraction",
            )


def text_records(pack: Pack, kind: str, most: int = 5_000_000) -> list[Any]:
    """The records of a kind, all held at once: for captions without photos. DataError where they are too many."""
    summary = pack.index.kinds.get(kind)  # type: ignore[call-overload]
    if summary is None:
        raise DataError(f"{pack.name} has no {kind}", f"it has {', '.join(pack.index.kinds)}")
    if min(summary.records, len(pack)) > most:
        raise DataError(
            f"{pack.name} has {summary.records:,} {kind}, text_only holds {most:,} in memory", "set limit of the source"
        )
    return list(pack.records(kind))
