"""What a source held when a checkpoint was written, so that a run doesn't go on with other data unnoticed.

A fingerprint is of the records as they are read, in their order, and of the names of their images: times of files, ids
and the folders that they are in don't count. That of a pack is made of its checksums.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mplug_core.data.records.types import KINDS
from mplug_core.data.shards.reading import Pack

Fingerprint = dict[str, Any]
"""``records``: how many there are, of all kinds together; ``fingerprint``: a digest of them, in hexadecimal."""
IDENTIFIERS = ("image_id", "question_id", "phrase_id", "pair_id", "identifier", "group")
"""Fields of records from which nothing is learned; some hold paths."""
MOST_NAMED = 3


def of_records(records: Mapping[str, Sequence[Any]], limit: int | None = None) -> Fingerprint:
    """Of the records of each task, of which ``limit`` are used; tasks that share a kind have the same ones."""
    digest, count, seen = hashlib.blake2b(digest_size=16), 0, set()
    for task, found in records.items():
        kind = KINDS.get(task, task)
        if kind in seen:
            continue
        seen.add(kind)
        used = found[:limit]
        count += len(used)
        digest.update(f"{kind} {len(used)}\n".encode())
        for record in used:
            digest.update(repr(list(_values(record))).encode("utf-8", "surrogatepass"))
    return {"records": count, "fingerprint": digest.hexdigest()}


def of_pack(pack: Pack) -> Fingerprint:
    """Of a pack, by the checksums in its index."""
    digest = hashlib.blake2b(digest_size=16)
    for entry, count in zip(pack.shards, pack.counts, strict=False):
        digest.update(f"{entry.sha256} {entry.texts.sha256} {count}\n".encode())
    return {"records": len(pack), "fingerprint": digest.hexdigest()}


def changed_data(before: Mapping[str, Any], now: Mapping[str, Fingerprint]) -> list[str]:
    """A line for each source whose records are others than before, with both counts."""
    lines = []
    for name, found in now.items():
        known = before.get(name)
        if not isinstance(known, Mapping) or known == found:
            continue
        had, has = known.get("records"), found["records"]
        if had == has:
            lines.append(f"source {name} has other records than when the checkpoint was written: {has} then and now")
        else:
            lines.append(f"source {name} has {has} records, and had {had} when the checkpoint was written")
    more = len(lines) - MOST_NAMED
    return [*lines[:MOST_NAMED], f"and {more} more sources have changed"] if more > 0 else lines


def _values(record: Any) -> Iterator[Any]:
    """The fields of a record from which something is learned; of images their names."""
    fields = dataclasses.fields(record) if dataclasses.is_dataclass(record) else ()
    for name in [field.name for field in fields] or vars(record):
        if name not in IDENTIFIERS:
            value = getattr(record, name)
            if name == "images":
                value = [image.name for image in value]
            yield value.name if isinstance(value, Path) else value
