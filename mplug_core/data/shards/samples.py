"""One sample: its members in a tar, and its JSON as typed records.

The JSON is ``{"images": [NAME, ...], "captions": [...], "questions": [...], ...}``: the fields of the records
(:mod:`mplug_core.data.records.types`), with the row of an image in ``images`` in place of its path.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mplug_core.bounded import Unreadable, parse_json
from mplug_core.data.folders import IMAGE_SUFFIXES
from mplug_core.data.records import (
    ENTAILMENT_LABELS,
    CaptionRecord,
    EntailmentRecord,
    PhraseRecord,
    QuestionRecord,
    StatementRecord,
)
from mplug_core.data.records.types import Record
from mplug_core.data.shards.index import KIND_NAMES
from mplug_core.errors import DataError

RECORD_TYPES: dict[str, type] = dict(
    zip(KIND_NAMES, (CaptionRecord, QuestionRecord, PhraseRecord, StatementRecord, EntailmentRecord), strict=True)
)
EXTENSIONS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
MAX_JSON = 16 << 20
"""Bytes of one sample's JSON."""
BLOCK = 512
END = bytes(2 * BLOCK)
"""What a tar ends in."""


class DamagedSample(DataError):
    """A sample can't be used; ``code`` is a word for counts."""

    default_code = "damaged"


@dataclass(frozen=True)
class Sample:
    """Encoded ``images`` (none where there are only texts), their ``names``, and records with rows of the images."""

    key: str
    images: tuple[bytes, ...]
    names: tuple[str, ...]
    records: dict[str, list[tuple[tuple[int, ...], Record]]]


def rows_of(record: dict[str, Any]) -> list[int]:
    """The rows of ``images`` that a record in JSON is about."""
    return record["images"] if "images" in record else [] if record.get("image") is None else [record["image"]]


def as_json(kind: str, record: Record, rows: Sequence[int]) -> dict[str, Any]:
    """A record's fields that say something, with ``rows`` for its images."""
    values: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name == "image":
            if rows:
                values["image"] = rows[0]
        elif field.name == "images":
            values["images"] = list(rows)
        elif (value not in ("", (), None, False)) or field.name in ("label", "answers", "weights", "kind", "image_id"):
            values[field.name] = value
    return values


def tar_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of a member; the same for the same name and data, whoever writes it and when."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def tar_sample(key: str, images: Sequence[tuple[str, bytes]], text: bytes) -> bytes:
    """The members of a sample: images by (extension, bytes), then the JSON."""
    several = len(images) > 1
    names = [
        f"{key}.{row}.{extension}" if several else f"{key}.{extension}" for row, (extension, _) in enumerate(images)
    ]
    members = [tar_member(name, data) for name, (_, data) in zip(names, images, strict=True)]
    return b"".join([*members, tar_member(f"{key}.json", text)])


def key_of(info: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member; DamagedSample for links, devices and names that lead out of the tar."""
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\0" in info.name or "\\" in info.name:
        raise DamagedSample(f"member {info.name[:100]!r} names a place outside", code="unsafe_name")
    if not info.isreg():
        raise DamagedSample(f"member {info.name[:100]!r} is a link, device or folder", code="unsafe_member")
    folder, _, base = info.name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}/{key}" if folder else key, extension.lower()


def read_sample(data: bytes, key: str) -> Sample:
    """The sample whose members are ``data``; DamagedSample for what is no image and JSON of ``key``."""
    images: dict[int, bytes] = {}
    text = None
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                name, extension = key_of(info)
                if name != key:
                    raise DamagedSample(f"expected member {key}, got {name[:100]!r}", code="other_sample")
                row, _, kind = extension.rpartition(".")
                if extension == "json":
                    if text is not None:
                        raise DamagedSample("its .json comes twice", code="broken_tar")
                    text = content_of(tar, info)
                elif kind in EXTENSIONS and (not row or row.isdecimal()) and len(row) < 9:
                    images[int(row or 0)] = content_of(tar, info)
                # anything else (.pkl, .npy, .pth ...) is never decoded
    except DamagedSample:
        raise
    except Exception as error:  # a damaged header makes tarfile raise many things
        raise DamagedSample(f"no tar members: {error}", code="broken_tar") from error
    if text is None:
        raise DamagedSample("no .json beside the image", code="missing_json")
    names, records = decode(text)
    if sorted(images) != list(range(len(names))):
        raise DamagedSample(f"{len(images)} images beside a .json of {len(names)}", code="missing_image")
    return Sample(key, tuple(images[row] for row in range(len(names))), names, records)


def content_of(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """The bytes of a member; DamagedSample where the tar ends before them."""
    data = tar.extractfile(info).read()  # type: ignore[union-attr]
    if len(data) != info.size:
        raise DamagedSample(f"member {info.name[:100]!r} is cut short", code="cut_short")
    return data


@cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(list[RECORD_TYPES[kind]])  # type: ignore[misc]


def decode(text: bytes) -> tuple[tuple[str, ...], dict[str, list[tuple[tuple[int, ...], Record]]]]:
    """Names of the images and the records by kind, from a sample's JSON; DamagedSample for anything else."""
    if len(text) > MAX_JSON:
        raise DamagedSample("the .json is too large", code="broken_json")
    try:
        values = parse_json(text)
    except Unreadable as error:
        raise DamagedSample(f"the .json can't be read: {error}", code="broken_json") from error
    names = values.get("images") if isinstance(values, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DamagedSample('the .json has no list "images"', code="broken_json")
    records = {}
    for kind in KIND_NAMES:
        if kind in values:
            try:
                records[kind] = _decode_kind(kind, values[kind], names)
            except (ValidationError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                fault = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                raise DamagedSample(f"the .json has broken {kind}: {fault}", code="broken_json") from error
    return tuple(names), records


def _decode_kind(kind: str, items: list[dict[str, Any]], names: list[str]) -> list[tuple[tuple[int, ...], Record]]:
    rows = [tuple(rows_of(item)) for item in items]
    if not all(type(row) is int and 0 <= row < len(names) for image_rows in rows for row in image_rows):
        raise ValueError("an image that is not there")
    placed = []
    for item, image_rows in zip(items, rows, strict=True):
        paths = [names[row] or str(row) for row in image_rows]
        field = {"images": paths} if kind == "statements" else {"image": paths[0] if paths else None}
        placed.append(item | field)
    records = _adapter(kind).validate_python(placed)
    for record in records:
        _check(record)
    return list(zip(rows, records, strict=True))


def _check(record: Record) -> None:
    """ValueError for values of the right type that no reader would give."""
    if isinstance(record, PhraseRecord):
        x0, y0, x1, y1 = record.box
        if not (all(map(math.isfinite, record.box)) and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(f"a box {record.box}")
    elif isinstance(record, CaptionRecord) and not record.captions:
        raise ValueError("no caption")
    elif isinstance(record, EntailmentRecord) and record.label not in (None, *ENTAILMENT_LABELS):
        raise ValueError(f"a label {record.label!r}")
    elif isinstance(record, QuestionRecord) and not (
        len(record.answers) == len(record.weights) and all(0 <= w < math.inf for w in record.weights)
    ):
        raise ValueError("answers and weights that don't fit")


def texts_of(kind: str, record: Mapping[str, Any]) -> list[str]:
    """The texts by whose words a kind is described."""
    if kind == "captions":
        return list(record["captions"])
    return [record[{"questions": "question", "phrases": "phrase", "statements": "statement"}.get(kind, "hypothesis")]]


def values_of(kind: str, record: Mapping[str, Any]) -> list[str]:
    """What is counted of a record: answers, phrases, labels or domains."""
    if kind == "captions":
        return [record["domain"]] if record.get("domain") else []
    if kind == "questions":
        return list(record["answers"])
    if kind == "phrases":
        return [record["phrase"]]
    return ["hidden" if record["label"] is None else str(record["label"]).lower()]
