"""What can be packed: any data set that a reader knows, lists of image-text pairs and URLs, img2dataset's output.

Every input becomes :class:`Item` in a fixed order, or a :class:`Fault` in its place; images are not opened here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mplug_core.bounded import Unreadable, as_text, parse_json, read_bytes, readable
from mplug_core.data.batches import image_groups
from mplug_core.data.records.files import DAMAGED, File, is_file
from mplug_core.data.records.finding import find
from mplug_core.data.records.inspection import claims
from mplug_core.data.records.reading import Reading, is_unicode, read_records, selection, usable
from mplug_core.data.records.rows import image_pairs, is_address
from mplug_core.data.records.types import KINDS, CaptionRecord, Record, images_of
from mplug_core.data.shards.download import MAX_BYTES
from mplug_core.data.shards.index import KIND_NAMES, is_pack_folder
from mplug_core.data.shards.remote import is_url
from mplug_core.data.shards.samples import EXTENSIONS, MAX_JSON, DamagedSample, as_json, content_of, key_of
from mplug_core.errors import DataError, shown_address

FORMATS = ("tsv", "urls", "img2dataset")
"""Formats beside those of the readers: columns of a table, JSON Lines with ``url``, img2dataset's two layouts."""

_SHARD = re.compile(r"\d{5,}(\.tar)?")


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
    if not os.path.exists(path) and not is_file(Path(path)):
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
        return readable(image.absolute().relative_to(base).as_posix())
    except ValueError:
        return readable(image.name)


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
        elif is_address(image) or is_url(image):
            yield _pair(where, Picture(shown_address(image), url=image.strip()), caption, _identity(image))
        else:
            yield _pair(where, Picture(image, path=folder / image), caption, image)


def _identity(url: str) -> str:
    """The image id that a URL gives: without its secrets, and still another one for another query."""
    shown = shown_address(url)
    if not shown.endswith("?***"):
        return shown
    return f"{shown}#{hashlib.sha256(url.partition('?')[2].encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _pair(name: str, picture: Picture | None, caption: str, image_id: str) -> Item:
    record = CaptionRecord(None, (" ".join(caption.split()),), image_id)
    fields = as_json("captions", record, () if picture is None else (0,))
    return Item(name, () if picture is None else (picture,), {"captions": [fields]})


def _table(file: File) -> Iterator[tuple[str, str, str] | Fault]:
    """``image<TAB>caption`` or ``url<TAB>caption``, in either order where one is a URL, or as a header names them."""
    for pair in image_pairs((str(number), line) for number, line in _lines(file)):
        where = f"{file.path.name}:{pair.where}"
        yield Fault(where, "broken_entry", pair.fault) if pair.fault else (where, pair.image, pair.caption)


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
        for number, raw in file.lines():
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
            if isinstance(found, Fault):
                yield found
            else:
                yield from _captioned(*found)


Part = bytes | Path


def _captioned(name: str, parts: list[tuple[str, Part]]) -> Iterator[Item | Fault]:
    """The samples of one key, whose members are named by what is behind its first dot.

    That may have dots itself: ``input.jpg`` and ``output.txt`` are the image and the caption of their key, and of
    several images each has the caption of its own name. A member that comes again is another sample's.
    """
    images: list[tuple[str, str, Part]] = []
    texts: dict[tuple[str, str], list[Part]] = {}
    for extension, part in parts:
        middle, _, kind = extension.rpartition(".")
        if kind in EXTENSIONS:
            images.append((middle, kind, part))
        elif kind in ("txt", "json"):
            texts.setdefault((middle, kind), []).append(part)
    alone = len({middle for middle, _, _ in images}) == 1
    seen: Counter[str] = Counter()
    for middle, kind, image in images:
        number = seen[middle]
        seen[middle] += 1
        of_it = f"{name}.{middle}" if middle and not alone else name
        of_it += f" ({number + 1})" if number else ""
        found: dict[str, Part] = {}
        for what in ("txt", "json"):
            # of one image the only text of another name, too
            places = [(middle, what)]
            if alone and (middle, what) not in texts:
                others = [place for place in texts if place[1] == what]
                places = others if len(others) == 1 else []
            for place in places:
                if texts.get(place):
                    found[what] = texts[place].pop(0)
        file = f"{name}.{middle}.{kind}" if middle else f"{name}.{kind}"
        yield _sample(of_it, file, image, found)
    if not images:
        yield Fault(name, "missing_image", "no image of this key")
        return
    for (middle, kind), left in texts.items():
        for _ in left:
            yield Fault(f"{name}.{middle}.{kind}" if middle else f"{name}.{kind}", "missing_image", "no image of it")


def _sample(name: str, file: str, image: Part, texts: dict[str, Part]) -> Item | Fault:
    """The item of an image and its caption in ``.txt`` or ``.json``."""
    caption, image_id = "", name
    try:
        values = parse_json(_bytes(texts["json"])) if "json" in texts else {}
        if isinstance(values, dict):
            caption, image_id = values.get("caption") or "", _identity(str(values.get("url") or name))
        if "txt" in texts:
            caption = as_text(_bytes(texts["txt"]))
    except Unreadable as error:
        return Fault(name, "broken_json", f"expected UTF-8 text and JSON: {error}")
    if not isinstance(caption, str) or not caption.strip() or not is_unicode(caption + image_id):
        return Fault(name, "missing_caption", "no caption of this key")
    picture = Picture(file, path=image) if isinstance(image, Path) else Picture(file, data=image)
    return _pair(name, picture, caption, image_id)


def _bytes(part: Part) -> bytes:
    return read_bytes(part, MAX_JSON) if isinstance(part, Path) else part


def _of_tar(path: Path) -> Iterator[tuple[str, list[tuple[str, Part]]] | Fault]:
    """(key, members by what is behind it) of neighbours with one key; what is neither image nor text is skipped
    unread."""
    key: str | None = None
    parts: list[tuple[str, Part]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                try:
                    name, extension = key_of(info)
                    if name != key or len(parts) >= _MOST_PARTS:
                        if key is not None:
                            yield f"{path.stem}/{key}", parts
                        key, parts = name, []
                    kind = extension.rpartition(".")[2]
                    if kind in EXTENSIONS or kind in ("txt", "json"):
                        if info.size > (MAX_BYTES if kind in EXTENSIONS else MAX_JSON):
                            raise DamagedSample(f"member {info.name[:100]!r} is too large", code="too_large")
                        parts.append((extension, content_of(tar, info)))
                except DamagedSample as error:
                    yield Fault(f"{path.name}", error.code, error.message)
        if key is not None:
            yield f"{path.stem}/{key}", parts
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        if key is not None and parts:
            yield f"{path.stem}/{key}", parts
        yield Fault(path.name, "broken_tar", f"damaged from here on: {error}")


def _of_folder(folder: Path) -> Iterator[tuple[str, list[tuple[str, Part]]] | Fault]:
    """(key, files by what is behind it) of the files of a folder."""
    keys: dict[str, list[tuple[str, Part]]] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield Fault(folder.name, "unreadable", f"the folder can't be read: {error.strerror}")
        return
    for name in names:
        stem, _, extension = name.partition(".")
        extension = extension.lower()
        kind = extension.rpartition(".")[2]
        if stem and kind in ("txt", "json") and not os.path.isfile(folder / name):
            yield Fault(f"{folder.name}/{name}", "unreadable", "it is not a file")
        elif stem and (kind in EXTENSIONS or kind in ("txt", "json")):
            keys.setdefault(stem, []).append((extension, folder / name))
    for key, parts in keys.items():
        yield f"{folder.name}/{key}", parts


_MOST_PARTS = 64
"""Members of one key that are held at once."""
