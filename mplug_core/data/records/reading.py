"""What all readers share: entries with checked fields, images looked for, and everything unusable kept in a list.

A :class:`Layout` says how one format is recognised, cut into entries, and how an entry becomes records. A broken entry
is named by file, place, field and what was expected there; it is never replaced, and never more than an entry.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mplug_core.bounded import shown
from mplug_core.data.records.files import DAMAGED, File
from mplug_core.data.records.types import CaptionRecord, Record, Records, counted, images_of
from mplug_core.errors import DataError


class Item(NamedTuple):
    """A record, the id of its image (for conditions on ids), and what makes it the same as another one, or None."""

    image_id: str
    record: Record
    key: Hashable | None = None


@dataclass(frozen=True)
class Layout:
    """One format of one kind of records.

    ``folders`` are the places where its images may be, best first. ``names`` are patterns of the file's name in a
    folder, the preferred ones first; the group ``split`` is the split. Names that other data sets have, too, are
    ``common``: such a file counts if it looks right. ``inside`` lists the splits of a file that has several.
    """

    name: str
    looks: Callable[[File], bool]
    entries: Callable[[Reading], Iterator[Entry]]
    parse: Callable[[Entry], Iterable[Item]]
    folders: Callable[[Reading], list[Path]]
    names: tuple[str, ...] = ()
    common: bool = False
    inside: Callable[[File], list[str]] | None = None


@dataclass(frozen=True)
class Source:
    """A file, or one split inside it, and how to read it."""

    file: File
    layout: Layout
    split: str | None = None
    inner: bool = False


COCO_SPLITS = ("train2014", "val2014", "train2017", "val2017", "test2015", "test2017", "test2014")
"""COCO's releases: 2017 has the images of 2014 in other splits, and under shorter names."""
_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg")


def coco_numbers(names: Iterable[str]) -> list[str]:
    """The numbers, of twelve digits, in names that COCO's images have in any release."""
    found = (_COCO_NAME.fullmatch(os.path.basename(name)) for name in names)
    return list(dict.fromkeys(match[1] for match in found if match))


def coco_spellings(number: str) -> list[str]:
    """What an image of COCO is called in its releases."""
    return [f"{number}.jpg", *(f"COCO_{split}_{number}.jpg" for split in COCO_SPLITS if not split.endswith("2017"))]


class Reading:
    """One source being read: where images are, and what went wrong so far."""

    def __init__(self, source: Source, images: str | Path | None = None, text_only: bool = False) -> None:
        self.file, self.layout, self.text_only = source.file, source.layout, text_only
        self.path, self.format = source.file.path, source.layout.name
        self.split = source.split
        self.inner = source.split if source.inner else None
        self.images = Path(images).absolute() if images is not None else None
        self.broken: list[DataError] = []
        self._seen: dict[Path, bool] = {}
        self._found: dict[tuple[str, ...], Path] = {}
        places = source.layout.folders(self)
        self.folders = [place for place in places if os.path.isdir(place)] or places[:1]
        self._last = (0, 0)
        self._coco: list[Path] | None = None
        self._subfolders: dict[tuple[int, str], bool] = {}

    @property
    def beside(self) -> Path:
        """The folder that the file is in; a data set that is a folder is its own."""
        here = self.path.absolute()
        return here if self.file.shape == "folder" else here.parent

    def image(self, *names: str) -> Path | None:
        """The first of an image's possible names that is in one of the folders, else the first name there."""
        if self.text_only:
            return None
        if names not in self._found:
            self._found[names] = self._look(names)
        return self._found[names]

    def _look(self, names: tuple[str, ...]) -> Path:
        numbers = coco_numbers(names)
        if len(names) * len(self.folders) == 1 and not numbers:
            return self.folders[0] / names[0]
        folder, name = self._last  # an image is mostly where the one before was
        pairs = [(folder, name)] + [(f, n) for f in range(len(self.folders)) for n in range(len(names))]
        for f, n in pairs:
            if n >= len(names) or not self._has_folder(f, os.path.dirname(names[n])):
                continue
            if os.path.isfile(path := self.folders[f] / names[n]):
                self._last = (f, n)
                return path
        return self._look_for_coco(numbers) or self.folders[0] / names[0]

    def _look_for_coco(self, numbers: list[str]) -> Path | None:
        """An image of COCO by its number, whatever release of COCO is there."""
        for number in numbers:
            for folder in self._coco_folders():
                for name in coco_spellings(number):
                    if os.path.isfile(path := folder / name):
                        return path
        return None

    def _coco_folders(self) -> list[Path]:
        """The folders that may have images of COCO and are there."""
        if self._coco is None:
            roots = [self.images] if self.images is not None else [self.beside, self.beside.parent]
            inside = ["", *COCO_SPLITS]
            every = [root / sub / name for root in (*roots, *self.folders) for sub in ("", "images") for name in inside]
            self._coco = [folder for folder in dict.fromkeys(every) if os.path.isdir(folder)]
        return self._coco

    def _has_folder(self, folder: int, sub: str) -> bool:
        """Whether a folder has a sub-folder; most layouts name many that are not there."""
        if sub and (folder, sub) not in self._subfolders:
            self._subfolders[folder, sub] = os.path.isdir(self.folders[folder] / sub)
        return not sub or self._subfolders[folder, sub]

    def exists(self, image: Path) -> bool:
        if image not in self._seen:
            self._seen[image] = os.path.isfile(image)
        return self._seen[image]

    @property
    def missing(self) -> list[Path]:
        return [image for image, there in self._seen.items() if not there]

    def fault(self, where: str, message: str) -> None:
        """Note a broken entry at ``where``: a line, or a place in the document."""
        self.broken.append(DataError(f"{self.path}{where}: {message}"))


class Entry:
    """One entry of a file, with checked access to its fields."""

    def __init__(self, reading: Reading, where: str, values: dict[str, Any]) -> None:
        self.reading, self.values = reading, values
        self.where = f"{reading.path}{where}"

    def fault(self, name: str, expected: str) -> DataError:
        if name not in self.values:
            return DataError(f'{self.where}: field "{name}" is missing, expected {expected}')
        return DataError(f'{self.where}: field "{name}": expected {expected}, got {shown(self.values[name])}')

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip() or not is_unicode(value):
            raise self.fault(name, "a text")
        return value.strip()

    def word(self, name: str, default: str = "") -> str:
        """A text that may be left out."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or not is_unicode(value):
            raise self.fault(name, "a word")
        return value.strip()

    def texts(self, name: str) -> list[str]:
        value = self.values.get(name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) and is_unicode(v) for v in values):
            raise self.fault(name, "a text or a list of texts")
        texts = [v.strip() for v in values if v.strip()]
        if not texts:
            raise self.fault(name, "at least one text that is not empty")
        return texts

    def name(self, name: str) -> str:
        """The name of an image, which becomes part of a path."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip() or "\0" in value or not is_unicode(value):
            raise self.fault(name, "the path of an image")
        return value

    def path(self, name: str) -> Path | None:
        """The image that a field names; None where only the texts are read."""
        return None if self.reading.text_only else self.reading.image(self.name(name))

    def pair(self, name: str) -> tuple[Path | None, Path | None]:
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != 2:
            raise self.fault(name, "the paths of two images")
        if not all(isinstance(v, str) and v and "\0" not in v and is_unicode(v) for v in value):
            raise self.fault(name, "the paths of two images")
        return self.reading.image(value[0]), self.reading.image(value[1])

    def numbers(self, name: str, count: int, expected: str) -> list[float]:
        value = self.values.get(name)
        if not isinstance(value, list | tuple) or len(value) != count or not all(map(is_number, value)):
            raise self.fault(name, expected)
        return [float(v) for v in value]

    def identity(self, name: str, expected: str = "a number or a text", default: str | None = None) -> str:
        """An id: a whole number or a text, as a text."""
        if name not in self.values and default is not None:
            return default
        value = self.values.get(name)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | str) or not is_unicode(str(shortened(value))):
            raise self.fault(name, expected)
        return str(value)

    def image_id(self) -> str:
        """The own format's image id: the field, or else the image's name, or the place of the entry."""
        if "image_id" in self.values:
            return self.identity("image_id")
        image = self.values.get("image", self.where)
        if isinstance(image, bool) or not isinstance(image, int | str):
            raise self.fault("image", "the path of an image")
        return str(image)


class Repeats(NamedTuple):
    """What makes an entry the same as another one: its ``name``, such as an id, and what it says."""

    name: str
    said: tuple[Hashable, ...]


def repeats(name: str, *said: Hashable) -> Repeats:
    """The key of an entry that is a duplicate where an earlier one has the same name and says the same."""
    return Repeats(name, said)


def read_records(reading: Reading, chosen: Callable[[str], bool], keep: bool = False) -> list[Any]:
    """All usable records of a source; captions of one image are joined, repeated entries are broken ones.

    ``keep``: also records whose image is not there.
    """
    found: list[Record] = []
    joined: dict[str, tuple[CaptionRecord, list[str]]] = {}
    keys: set[Hashable] = set()
    for entry in reading.layout.entries(reading):
        try:
            for image_id, record, key in reading.layout.parse(entry):
                if key is not None:
                    if key in keys:
                        same = key if isinstance(key, str) else getattr(key, "name", "all fields are equal")
                        raise DataError(f"{entry.where}: a duplicate of an entry before, the first is kept: {same}")
                    keys.add(key)
                if not chosen(image_id):
                    continue
                if isinstance(record, CaptionRecord):
                    joined.setdefault(image_id, (record, []))[1].extend(record.captions)
                else:
                    found.append(record)
        except DataError as error:
            reading.broken.append(error)
    for first, captions in joined.values():
        found.append(CaptionRecord(first.image, tuple(captions), first.image_id, first.domain))
    # A list, not a generator: of a pair both images are looked for.
    return [record for record in found if all([reading.exists(image) for image in images_of(record)]) or keep]


def usable(reading: Reading, records: list[Any]) -> Records[Any]:
    """The outcome; DataError where there is nothing to use."""
    if records:
        return Records(records, reading.path, reading.format, reading.missing, reading.broken)
    if reading.broken:
        more = f" (and {len(reading.broken) - 1} more)" if len(reading.broken) > 1 else ""
        raise DataError(f"nothing in {reading.path} can be used: {reading.broken[0].message}{more}", "correct it")
    if missing := reading.missing:
        raise DataError(
            f"none of the {counted(len(missing), 'image')} of {reading.path} is there; the first is {missing[0]}",
            "put the images there, or give their folder; captions and questions alone can be read as text only",
        )
    raise DataError(f"{reading.path} has no records", "give a file with at least one")


def own_entries(reading: Reading) -> Iterator[Entry]:
    """Objects of JSON Lines, or of a JSON list."""
    if reading.file.shape == "list" or reading.format == "json":
        items = reading.file.value
        if not isinstance(items, list):
            raise DataError(f"{reading.path}: expected a list of objects, got {type(items).__name__}", "correct it")
        return objects(reading, ((f": entry {index}", item) for index, item in enumerate(items)))
    return objects(reading, json_lines(reading))


def objects(reading: Reading, numbered: Iterable[tuple[str, Any]]) -> Iterator[Entry]:
    """Those of ``numbered`` (place, value) that are objects; the others are broken."""
    for where, item in numbered:
        if isinstance(item, dict):
            yield Entry(reading, where, item)
        else:
            reading.fault(where, f"expected a JSON object {{...}}, got {shown(item, 60)}")


def json_lines(reading: Reading) -> Iterator[tuple[str, Any]]:
    """(:line, value); lines that are no JSON are broken."""
    for where, line in lines(reading):
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            reading.fault(where, f"expected a JSON object on the line: {reason}")
            continue
        yield where, item


def lines(reading: Reading, file: File | None = None) -> Iterator[tuple[str, str]]:
    """(:line, text) of the lines that are not blank; those that are not UTF-8 are broken."""
    number = 0
    try:
        for number, raw in (file or reading.file).lines():
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                reading.fault(f":{number}", f"expected UTF-8 text, got the byte 0x{raw[error.start]:02x}")
                continue
            if text and not text.isspace():
                yield f":{number}", text
    except DAMAGED as error:
        reading.fault(f":{number + 1}", f"expected more lines, the file is damaged from here on: {error}")


def table(reading: Reading, name: str, like: str, value: Any = None, path: Path | None = None) -> list[Any]:
    """A list in a JSON document, ``like`` in what; DataError if it is not there."""
    value = reading.file.value if value is None else value
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f'{path or reading.path}: field "{name}": expected a list, as in {like}', "correct it")
    return found


def table_entries(reading: Reading, name: str, like: str) -> Iterator[Entry]:
    """The objects of a list in a document."""
    return objects(reading, ((f": {name}[{index}]", item) for index, item in enumerate(table(reading, name, like))))


def images_by_id(reading: Reading, like: str, value: Any = None, path: Path | None = None) -> dict[int | str, Any]:
    """COCO's ``images`` by their id; an image without one is broken."""
    images: dict[int | str, Any] = {}
    for index, image in enumerate(table(reading, "images", like, value, path)):
        if isinstance(image, dict) and is_id(image.get("id")):
            images[image["id"]] = image
        else:
            reading.fault(f": images[{index}]", 'field "id": expected a number')
    return images


def own_folder(reading: Reading) -> list[Path]:
    """Names of the own format are relative to the file."""
    return [reading.images or reading.beside]


def places(*names: str, above: bool = True) -> Callable[[Reading], list[Path]]:
    """Sub-folders ``names`` beside the file, then one folder up, then the file's own folder; or what the user named."""

    def folders(reading: Reading) -> list[Path]:
        base = reading.beside
        roots = (base, base.parent) if above else (base,)
        if reading.images is not None:
            return [reading.images, *(reading.images / name for name in names)]
        return [*(root / name for root in roots for name in names), base]

    return folders


def selection(split: str | None) -> tuple[str | None, Callable[[str], bool]]:
    """``val2017[id%5==0]``: the split, and the test of image ids that are numbers; all pass without brackets."""
    match = re.fullmatch(r"(.*)\[id%(\d{1,9})(==|!=)(\d{1,9})\]", split or "")
    if match is None:
        return split, lambda image_id: True
    divisor, remainder, equal = int(match[2]), int(match[4]), match[3] == "=="
    if divisor == 0:
        raise DataError(f"split {split}: ids can't be divided by 0", "write val2017[id%5==0], for example")

    def chosen(image_id: str) -> bool:
        digits = re.search(r"(\d{1,1000})\D*$", image_id)  # int() refuses more than some thousands
        return (digits is not None and int(digits[1]) % divisor == remainder) == equal

    return match[1] or None, chosen


def is_unicode(text: str) -> bool:
    """Whether a text can be written: half of a surrogate pair can't."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: Any) -> bool:
    """A number that a float can hold; not NaN, infinity or a truth value."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def shortened(value: Any) -> Any:
    """A value that can be written: whole numbers of thousands of digits can't."""
    return "a huge number" if isinstance(value, int) and abs(value) >= 10**1000 else value
