"""Which samples make a batch: arithmetic on (seed, place), with nothing remembered and nothing of the records held.

*Places* number the samples that a run draws: the first global batch of G samples has places 0 .. G-1, and so on. An
epoch lays the shards end to end in an order shuffled by (seed, epoch) and cuts that line into equal *lanes*; the places
of a global batch take from the lanes in turn, G / lanes neighbours from each. So a process, which has neighbouring
places, reads lanes of its own while the others read theirs, and yet the samples of a global batch depend on nothing but
G: any split of it over processes and accumulated parts draws the same. Within a lane samples are shuffled inside of
windows of a few shards.

What fills no whole global batch at the end of the line is left out of an epoch; which shards are there changes with
the epoch. Of a pack that is smaller than a global batch all samples are drawn in turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

Sample = tuple[int, int]
"""A shard's number and the number of a sample in it."""

_KEPT = 64  # shuffled windows; one takes 8 bytes a sample


class Order:
    """The samples at the places of a pack whose shards have ``counts`` samples."""

    def __init__(self, counts: Sequence[int], batch: int, lanes: int = 1, window: int | None = None) -> None:
        """``batch``: samples of a global batch. ``lanes``: at most so many, as many as divide the batch evenly.

        ``window``: samples that are shuffled among each other; default: of two shards, at least 4,096.
        """
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        if self.total < batch:
            lanes, batch = 1, self.total
        self.batch = batch
        self.steps = self.total // batch
        self.lanes = max(count for count in range(1, min(lanes, batch) + 1) if batch % count == 0)
        self.chunk = batch // self.lanes
        self.lane_length = self.steps * self.chunk
        self.window = window or max(4096, 2 * self.total // len(self.counts))
        self._lines: OrderedDict[Hashable, Any] = OrderedDict()
        self._windows: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def epoch_length(self) -> int:
        """Places in which no sample comes twice."""
        return self.steps * self.batch

    def sample(self, seed: int, place: int) -> Sample:
        """The sample at a place."""
        epoch, lane, offset = self._located(place)
        number, inside = divmod(offset, self.window)
        position = (
            lane * self.lane_length + number * self.window + int(self._shuffled(seed, epoch, lane, number)[inside])
        )
        line, ends = self._line(seed, epoch)
        slot = int(np.searchsorted(ends, position, side="right"))
        shard = int(line[slot])
        return shard, position - int(ends[slot] - self.counts[shard])

    def ahead(self, seed: int, places: Sequence[int]) -> list[int]:
        """The shards of the windows that follow those of ``places``, each once, to be fetched before their turn."""
        found: dict[int, None] = {}
        for epoch, lane, number in dict.fromkeys((e, k, o // self.window) for e, k, o in map(self._located, places)):
            start = (number + 1) * self.window
            if start >= self.lane_length:
                epoch, start = epoch + 1, 0
            line, ends = self._line(seed, epoch)
            first = lane * self.lane_length + start
            last = lane * self.lane_length + min(start + self.window, self.lane_length) - 1
            low, high = np.searchsorted(ends, (first, last), side="right")
            found |= dict.fromkeys(line[low : high + 1].tolist())
        return list(found)

    def _located(self, place: int) -> tuple[int, int, int]:
        """Epoch and lane of a place, and how far it is in the lane."""
        epoch, within = divmod(place, self.epoch_length)
        step, slot = divmod(within, self.batch)
        lane, inside = divmod(slot, self.chunk)
        return epoch, lane, step * self.chunk + inside

    def _line(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and where each ends on the line."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            line = np.random.default_rng([seed & 0x7FFFFFFF, epoch]).permutation(len(self.counts))
            return line, np.cumsum(self.counts[line])

        return _kept(self._lines, (seed, epoch), make, 4)

    def _shuffled(self, seed: int, epoch: int, lane: int, number: int) -> np.ndarray:
        """The order inside of a window of a lane."""

        def make() -> np.ndarray:
            length = min(self.window, self.lane_length - number * self.window)
            return np.random.default_rng([seed & 0x7FFFFFFF, epoch, lane, number]).permutation(length)

        return _kept(self._windows, (seed, epoch, lane, number), make, max(_KEPT, 2 * self.lanes))


def _kept(cache: OrderedDict[Hashable, Any], key: Hashable, make: Callable[[], Any], most: int) -> Any:
    """``make()`` of ``key``, kept with the ``most`` used last."""
    if key in cache:
        cache.move_to_end(key)
    else:
        cache[key] = make()
        if len(cache) > most:
            cache.popitem(last=False)
    return cache[key]
