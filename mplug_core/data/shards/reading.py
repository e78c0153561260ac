"""A pack opened: samples of a shard by their number, with one read each, and all texts in one pass."""

from __future__ import annotations

import gzip
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mplug_core.data.records.types import Record
from mplug_core.data.shards.index import PackIndex, ShardEntry
from mplug_core.data.shards.remote import Folder, RemoteFolder, Unreachable
from mplug_core.data.shards.samples import END, MAX_JSON, DamagedSample, Sample, decode, read_sample

_OPEN = 32
MAX_SAMPLE = 1 << 30
"""Bytes of one sample."""


def pack_places(places: list[int], checks: list[int]) -> bytes:
    """The bytes of an ``.idx``: where each sample begins and the last one ends (uint64), then CRC-32s (uint32)."""
    return np.asarray(places, "<u8").tobytes() + np.asarray(checks, "<u4").tobytes()


class Shard:
    """An open tar. Damage beyond its size is found sample by sample, by a CRC over each."""

    def __init__(self, tar: Path, offsets: Path, entry: ShardEntry) -> None:
        """Unreachable where the offsets aren't the tar's."""
        self.name, self.first = entry.name, entry.first
        data = offsets.read_bytes()
        count = entry.samples
        if len(data) != 12 * count + 8:
            raise Unreachable(f"{offsets} has not the places of {count:,} samples, as the index says", "copy it again")
        self.places = np.frombuffer(data, "<u8", count + 1)
        self.checks = np.frombuffer(data, "<u4", count, offset=8 * (count + 1))
        lengths = np.diff(self.places.astype(np.int64))
        outside = self.places[0] != 0 or self.places[-1] + len(END) != entry.bytes
        if outside or (lengths <= 0).any() or (lengths > MAX_SAMPLE).any():
            raise Unreachable(f"{offsets} names places that {entry.name} doesn't have", "copy it again")
        self._file = os.open(tar, os.O_RDONLY)

    def read(self, number: int) -> Sample:
        """Sample ``number`` of the shard; DamagedSample with a reason, without the shard's name."""
        start, end = int(self.places[number]), int(self.places[number + 1])
        try:
            data = os.pread(self._file, end - start, start)  # no seek: forked processes share the file
        except OSError as error:
            raise DamagedSample(f"can't be read: {error.strerror}", code="unreadable") from error
        if len(data) != end - start:
            raise DamagedSample("the shard is cut short", code="cut_short")
        if zlib.crc32(data) != self.checks[number]:
            raise DamagedSample("its bytes have changed", code="checksum")
        return read_sample(data, f"{self.first + number:09d}")

    def close(self) -> None:
        os.close(self._file)


class Pack:
    """The shards of a pack at a folder or URL, opened when they are needed."""

    def __init__(self, folder: Folder, limit: int | None = None) -> None:
        """``limit``: use the first samples alone."""
        self.folder, self.name = folder, folder.name
        self.index: PackIndex = folder.index()
        self.shards = self.index.shards
        self.counts: list[int] = []
        left = self.index.samples if limit is None else min(limit, self.index.samples)
        for entry in self.shards:
            if left <= 0:
                break
            self.counts.append(min(entry.samples, left))
            left -= entry.samples
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.counts)

    def shard(self, number: int) -> Shard:
        """An open shard; Unreachable where it isn't what the index says."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        entry = self.shards[number]
        offsets = self.folder.file(entry.offsets_name, entry.offsets, verify=True)
        tar = self.folder.file(entry.name, entry)
        try:
            shard = Shard(tar, offsets, entry)
        except OSError as error:  # of a full cache it may just have been removed
            raise Unreachable(f"{tar} can't be read: {error.strerror}", "raise data.cache_gb") from error
        self._open[number] = shard
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)[1].close()
        return shard

    @property
    def fetched(self) -> bool:
        """Whether its files come from elsewhere."""
        return isinstance(self.folder, RemoteFolder)

    def ahead(self, shards: list[int]) -> None:
        """Have these fetched in the background, where fetching is needed."""
        entries = [self.shards[number] for number in shards]
        self.folder.ahead([pair for e in entries for pair in ((e.offsets_name, e.offsets), (e.name, e))])

    def texts(self) -> Iterator[tuple[str, dict[str, list[tuple[tuple[int, ...], Record]]]]]:
        """(key, records by kind) of all samples in order, without touching an image.

        Unreachable where the file of a shard's texts is missing or another one; DamagedSample for a broken line.
        """
        for number, count in enumerate(self.counts):
            entry = self.shards[number]
            file = self.folder.file(entry.texts_name, entry.texts, verify=True)
            lines = 0
            try:
                with gzip.open(file, "rb") as stream:
                    while lines < count and (line := stream.readline(MAX_JSON + 2)):
                        yield f"{entry.first + lines:09d}", decode(line)[1]
                        lines += 1
            except (OSError, EOFError, zlib.error) as error:
                raise Unreachable(f"{file} is damaged: {error}", "copy it again") from error
            if lines < count:
                raise Unreachable(f"{file} has {lines:,} samples, the index says {entry.samples:,}", "copy it again")

    def records(self, kind: str) -> Iterator[Any]:
        """All records of a kind."""
        for _, records in self.texts():
            for _, record in records.get(kind, ()):
                yield record

    def faults(self, verify: bool = False) -> Iterator[tuple[int, Unreachable]]:
        """(shard, error) of each shard of a local pack that isn't what the index says; ``verify``: by checksums.

        Without ``verify`` files are looked at, not read: missing ones and other sizes.
        """
        for number in range(len(self.counts)):
            for name, entry in self.shards[number].files():
                try:
                    self.folder.file(name, entry, verify)
                except Unreachable as error:
                    yield number, error
                    break
