"""What can be packed: any data set that a reader knows, lists of image-text pairs and URLs, img2dataset's output.

Every input becomes :class:`Item` in a fixed order, or a :class:`Fault` in its place; images are not opened here.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mplug_core.data.batches import image_groups
from mplug_core.data.records.files import DAMAGED, File
from mplug_core.data.records.finding import find
from mplug_core.data.records.inspection import claims
from mplug_core.data.records.reading import Reading, is_unicode, read_records, selection, usable
from mplug_core.data.records.types import KINDS, CaptionRecord, Record, images_of
from mplug_core.data.shards.download import MAX_BYTES
from mplug_core.data.shards.index import KIND_NAMES, is_pack_folder
from mplug_core.data.shards.remote import is_url
from mplug_core.data.shards.samples import EXTENSIONS, MAX_JSON, DamagedSample, as_json, content_of, key_of
from mplug_core.errors import DataError

FORMATS = ("tsv", "urls", "img2dataset")
"""Formats beside those of the readers: columns of a table, JSON Lines with ``url``, img2dataset's two layouts."""

_SHARD = re.compile(r"\d{5,}(\.tar)?")
_URL = re.compile(r"\s*[a-zA-Z][a-zA-Z0-9+.-]*://\S+\s*")
_IMAGE_COLUMNS, _TEXT_COLUMNS = ("image", "url", "filepath"), ("caption", "text", "title")


@dataclass(frozen=True)
class Picture:
    """An image to be packed: its ``name``, and one of a file, a URL and its bytes."""

    name: str
    path: Path | None = None
    url: str | None = None
    data: bytes | None = None


@dataclass(frozen=True)
class Item:
    """What becomes one sample: pictures, and records in JSON with rows of the pictures, by kind."""

    name: str
    pictures: tuple[Picture, ...]
    records: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Fault:
    """An entry that can't be packed."""

    name: str
    code: str
    message: str


def open_inputs(
    path: str,
    split: str | None = None,
    format: str | None = None,
    images: str | None = None,
    tasks: Sequence[str] = (),
    text_only: bool = False,
) -> Iterator[Item | Fault]:
    """The items of a data set; ``tasks``: default all that it serves. DataError where there is nothing to read."""
    if is_url(path):
        raise DataError(f"{path} is a URL", "data is packed from local files: download the list, not its images")
    if not os.path.exists(path):
        raise DataError(f"there is no data at {path}", "check the path")
    if is_pack_folder(path):
        raise DataError(f"{path} is a pack already", "name what it was made from")
    kinds = list(dict.fromkeys(KINDS[task] for task in tasks))
    found = format if format in FORMATS else _looks_like(Path(path), text_only) if format is None else None
    if found is None:
        return _records(path, split, format, images, kinds, text_only)
    if kinds not in ([], ["captions"]):
        raise DataError(f"{path} ({found}) has captions alone, not {', '.join(kinds)}", "leave --task out")
    if split is not None:
        raise DataError(f"{path} ({found}) has no splits", "leave the split out")
    if found == "img2dataset":
        if text_only:
            raise DataError(f"{path} has images", "leave --text-only out")
        return _img2dataset(Path(path))
    rows = _url_lines(File(Path(path))) if found == "urls" else _table(File(Path(path)))
    return _pairs(rows, Path(images) if images else Path(path).absolute().parent, text_only)


def _looks_like(path: Path, text_only: bool) -> str | None:
    """One of :data:`FORMATS`, or None where readers know better."""
    if path.is_dir():
        names = os.listdir(path)
        shards = [name for name in names if _SHARD.fullmatch(name)]
        return "img2dataset" if shards and not any(name.endswith(".jsonl") for name in names) else None
    file = File(path)
    if file.name.endswith((".tsv", ".tab")):
        return "tsv"
    if file.shape == "lines" and isinstance(file.sample.get("url"), str) and "image" not in file.sample:
        return "urls"
    return None


# -- records of the readers ------------------------------------------------------------------------------------------


def _records(
    path: str, split: str | None, format: str | None, images: str | None, kinds: list[str], text_only: bool
) -> Iterator[Item | Fault]:
    """All kinds of one data set, joined by image."""
    found: dict[str, list[Record]] = {}
    faults: list[Fault] = []
    if text_only and kinds not in ([], ["captions"]):
        raise DataError(f"without images there are no {', '.join(kinds)}", "text only is for captions")
    errors = []
    for kind in kinds or (["captions"] if text_only else KIND_NAMES):
        try:
            named, chosen = selection(split)
            source = find(kind, Path(path), named, format)
            if not kinds and not claims(kind, source):
                continue
            reading = Reading(source, images, text_only)
            records = usable(reading, read_records(reading, chosen))
        except DataError as error:
            if kinds:
                raise
            errors.append(error)
            continue
        found[kind] = records.records
        faults += [Fault(_relative(image, path), "missing", "does not exist") for image in records.missing]
        faults += [Fault(kind, "broken_entry", error.message) for error in records.broken]
    if not found:
        raise errors[0] if errors else DataError(f"nothing in {path} is understood", "see docs/data.md")
    faults = list(dict.fromkeys(faults))
    if text_only:
        return _texts_alone(found["captions"], path, faults)
    return _joined(found, path, faults)


def _texts_alone(records: Iterable[Record], path: str, faults: list[Fault]) -> Iterator[Item | Fault]:
    for number, record in enumerate(records):
        if isinstance(record, CaptionRecord) and path in record.image_id:  # the place of the entry, on this machine
            record = replace(record, image_id=str(number))
        yield Item(f"text {number}", (), {"captions": [as_json("captions", record, ())]})
    yield from faults


def _joined(found: Mapping[str, list[Record]], path: str, faults: list[Fault]) -> Iterator[Item | Fault]:
    """An item a group of images that records join, in the order in which images come first."""
    numbers: dict[Path, int] = {}
    records: list[tuple[str, Record, tuple[int, ...]]] = []
    for kind, items in found.items():
        for record in items:
            rows = tuple(numbers.setdefault(image, len(numbers)) for image in images_of(record))
            records.append((kind, record, rows))
    groups = image_groups(len(numbers), [rows for _, _, rows in records])
    group_of = {image: number for number, group in enumerate(groups) for image in group}
    of_group: list[list[tuple[str, Record, tuple[int, ...]]]] = [[] for _ in groups]
    for kind, record, rows in records:
        of_group[group_of[rows[0]]].append((kind, record, rows))
    paths = list(numbers)
    for group, mine in zip(groups, of_group, strict=True):
        row_of = {image: row for row, image in enumerate(group)}
        fields: dict[str, list[dict[str, Any]]] = {}
        for kind, record, rows in mine:
            fields.setdefault(kind, []).append(as_json(kind, record, [row_of[image] for image in rows]))
        pictures = tuple(Picture(_relative(paths[image], path), path=paths[image]) for image in group)
        yield Item(pictures[0].name, pictures, fields)
    yield from faults


def _relative(image: Path, path: str) -> str:
    """The name of an image without the folders that are this machine's own."""
    base = Path(path).absolute()
    base = base if base.is_dir() else base.parent
    try:
        return image.absolute().relative_to(base).as_posix()
    except ValueError:
        return image.name


# -- pairs -----------------------------------------------------------------------------------------------------------


def _pairs(rows: Iterable[tuple[str, str, str] | Fault], folder: Path, text_only: bool) -> Iterator[Item | Fault]:
    """Items of (place, image or URL, caption)."""
    for number, row in enumerate(rows):
        if isinstance(row, Fault):
            yield row
            continue
        where, image, caption = row
        if not caption.strip() or not is_unicode(caption):
            yield Fault(where, "no_caption", "expected a caption")
        elif text_only:
            yield _pair(f"text {number}", None, caption, str(number))
        elif not image.strip() or "\0" in image or not is_unicode(image):
            yield Fault(where, "no_image", "expected an image or URL")
        elif _URL.fullmatch(image) or is_url(image):
            yield _pair(where, Picture(image.strip(), url=image.strip()), caption, image.strip())
        else:
            yield _pair(where, Picture(image, path=folder / image), caption, image)


def _pair(name: str, picture: Picture | None, caption: str, image_id: str) -> Item:
    record = CaptionRecord(None, (" ".join(caption.split()),), image_id)
    fields = as_json("captions", record, () if picture is None else (0,))
    return Item(name, () if picture is None else (picture,), {"captions": [fields]})


def _table(file: File) -> Iterator[tuple[str, str, str] | Fault]:
    """``image<TAB>caption`` or ``url<TAB>caption``, in either order where one is a URL, or as a header names them."""
    columns: tuple[int, int] | None = None
    for number, line in _lines(file):
        where = f"{file.path.name}:{number}"
        cells = next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE), [])
        if number == 1 and (columns := _header(cells)):
            continue
        if len(cells) < 2 or (columns and max(columns) >= len(cells)):
            yield Fault(where, "broken_entry", f"expected two columns, got {len(cells)}")
        elif columns:
            yield where, cells[columns[0]], cells[columns[1]]
        elif _URL.fullmatch(cells[1]) and not _URL.fullmatch(cells[0]):  # as CC3M has them
            yield where, cells[1], cells[0]
        else:
            yield where, cells[0], cells[1]


def _header(cells: list[str]) -> tuple[int, int] | None:
    names = [cell.strip().lower() for cell in cells]
    image = next((names.index(name) for name in _IMAGE_COLUMNS if name in names), None)
    text = next((names.index(name) for name in _TEXT_COLUMNS if name in names), None)
    return None if image is None or text is None else (image, text)


def _url_lines(file: File) -> Iterator[tuple[str, str, str] | Fault]:
    """JSON Lines ``{"url": ..., "caption": ...}``."""
    for number, line in _lines(file):
        where = f"{file.path.name}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        url = values.get("url") if isinstance(values, dict) else None
        caption = (values.get("caption") or values.get("text")) if isinstance(values, dict) else None
        if isinstance(url, str) and isinstance(caption, str):
            yield where, url, caption
        else:
            yield Fault(where, "broken_entry", 'expected {"url": ..., "caption": ...}')


def _lines(file: File) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not blank. DataError for a damaged file."""
    try:
        with file.open() as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").rstrip("\r\n")
                if line.strip():
                    yield number, line
    except DAMAGED as error:
        raise DataError(f"{file.path} is damaged: {error}", "copy it again") from error


# -- img2dataset -----------------------------------------------------------------------------------------------------


def _img2dataset(folder: Path) -> Iterator[Item | Fault]:
    """Shards ``00000.tar`` in their order, or folders ``00000/``; parquet and statistics beside them aren't needed."""
    shards = sorted(entry.name for entry in os.scandir(folder) if _SHARD.fullmatch(entry.name))
    for name in shards:
        members = _of_tar(folder / name) if name.endswith(".tar") else _of_folder(folder / name)
        for found in members:
            yield found if isinstance(found, Fault) else _captioned(*found)


def _captioned(name: str, parts: dict[str, Any]) -> Item | Fault:
    """The item of one key: an image, and a caption in ``.txt`` or ``.json``."""
    extension = next((key for key in parts if key in EXTENSIONS), None)
    if extension is None:
        return Fault(name, "missing_image", "no image of this key")
    caption, image_id = "", name
    try:
        values = json.loads(parts["json"]) if "json" in parts else {}
        if isinstance(values, dict):
            caption, image_id = values.get("caption") or "", str(values.get("url") or name)
        if "txt" in parts:
            caption = parts["txt"].decode("utf-8")
    except (ValueError, RecursionError):
        return Fault(name, "broken_json", "expected UTF-8 text and JSON")
    if not isinstance(caption, str) or not caption.strip() or not is_unicode(caption + image_id):
        return Fault(name, "missing_caption", "no caption of this key")
    image = parts[extension]
    file = f"{name}.{extension}"
    picture = Picture(file, path=image) if isinstance(image, Path) else Picture(file, data=image)
    return _pair(name, picture, caption, image_id)


def _of_tar(path: Path) -> Iterator[tuple[str, dict[str, Any]] | Fault]:
    """(key, extension -> bytes) of neighbours with one key; what is neither image nor text is skipped unread."""
    key, parts = None, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                try:
                    name, extension = key_of(info)
                    if name != key:
                        if parts:
                            yield f"{path.stem}/{key}", parts
                        key, parts = name, {}
                    if extension in EXTENSIONS or extension in ("txt", "json"):
                        if info.size > (MAX_BYTES if extension in EXTENSIONS else MAX_JSON):
                            raise DamagedSample(f"member {info.name[:100]!r} is too large", code="too_large")
                        parts[extension] = content_of(tar, info)
                except DamagedSample as error:
                    yield Fault(f"{path.name}", error.code, error.message)
        if parts:
            yield f"{path.stem}/{key}", parts
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if parts:
            yield f"{path.stem}/{key}", parts
        yield Fault(path.name, "broken_tar", f"damaged from here on: {error}")


def _of_folder(folder: Path) -> Iterator[tuple[str, dict[str, Any]] | Fault]:
    """(key, extension -> file or bytes) of the files of a folder."""
    keys: dict[str, dict[str, Any]] = {}
    for name in sorted(os.listdir(folder)):
        stem, _, extension = name.partition(".")
        extension = extension.lower()
        if extension in EXTENSIONS:
            keys.setdefault(stem, {})[extension] = folder / name
        elif extension in ("txt", "json"):
            keys.setdefault(stem, {})[extension] = (folder / name).read_bytes()[:MAX_JSON]
    for key, parts in keys.items():
        yield f"{folder.name}/{key}", parts
