"""Data sets in: every supported layout becomes a list of typed records, one reader a task.

A reader finds the file (a file, or a folder and a split), recognises its format by looking into it, and returns
:class:`Records`: what is usable, and beside it every image that is not there and every entry that is broken, each named
by file, place, field and what was expected there. Nothing is replaced or dropped without being in that list; a data
set with nothing usable is an error. Images are looked for, not opened: a damaged one shows when it is read.

Layouts of captions:

- JSON Lines, one ``{"image": PATH, "caption": STR or [STR]}`` a line, or a JSON list of the same; paths relative to the
  file;
- Flickr8k: CSV with the header ``image,caption``, images in ``images/`` beside it;
- COCO: ``annotations/captions_SPLIT.json``, images in ``SPLIT/`` beside ``annotations/``;
- a folder of these, with the split in the file's name (``captions_SPLIT.*``) or as a subfolder (scenes).

Questions, phrases, statements and entailments are JSON Lines in the layout that ``mplug data scenes`` writes.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from mplug_core.errors import DataError

Format = Literal["jsonl", "json", "flickr8k", "coco"]
ENTAILMENT_LABELS = ("entailment", "neutral", "contradiction")

_EXTENSIONS = (".jsonl", ".json", ".csv", ".txt")
_FLICKR_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images")


@dataclass(frozen=True)
class CaptionRecord:
    """One image with all of its captions. ``image`` is None where only the captions were asked for."""

    image: Path | None
    captions: tuple[str, ...]
    image_id: str


@dataclass(frozen=True)
class QuestionRecord:
    """A question with its answers; ``weights`` sum to 1, ``kind`` is a free word ("color", "count", ...) or empty."""

    image: Path
    question: str
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    kind: str


@dataclass(frozen=True)
class PhraseRecord:
    """A phrase and the box it means: (x0, y0, x1, y1) as shares 0..1 of the image's width and height."""

    image: Path
    phrase: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class StatementRecord:
    """A statement on a pair of images, and whether it is true."""

    images: tuple[Path, Path]
    statement: str
    label: bool


@dataclass(frozen=True)
class EntailmentRecord:
    """A hypothesis on an image: ``label`` is "entailment", "neutral" or "contradiction"."""

    image: Path
    hypothesis: str
    label: str


R = TypeVar("R", CaptionRecord, QuestionRecord, PhraseRecord, StatementRecord, EntailmentRecord)


@dataclass(frozen=True)
class Records(Generic[R]):
    """What a reader found: usable ``records``, ``missing`` images, ``broken`` entries as errors that name them."""

    records: list[R]
    source: Path
    format: Format
    missing: list[Path] = field(default_factory=list)
    broken: list[DataError] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[R]:
        return iter(self.records)

    def report(self) -> str:
        """One line: how many records, what is missing, what is broken, with the first of each."""
        parts = [f"{self.source} ({self.format}): {_count(len(self.records), 'record')}"]
        if self.missing:
            parts.append(f"{_count(len(self.missing), 'missing image')} (first: {self.missing[0]})")
        if self.broken:
            broken = _count(len(self.broken), "broken entry", "broken entries")
            parts.append(f"{broken} (first: {self.broken[0].message})")
        return "; ".join(parts)

    def complete(self) -> Records[R]:
        """Itself if nothing is missing or broken; otherwise raises DataError with the report."""
        if self.missing or self.broken:
            raise DataError(f"the data set is not complete: {self.report()}", "repair or remove what is named")
        return self


CaptionData = Records[CaptionRecord]


def read_captions(
    path: str | Path,
    split: str | None = None,
    format: Format | None = None,
    images: str | Path | None = None,
    text_only: bool = False,
) -> Records[CaptionRecord]:
    """Captions, one record an image, in the order of the file (entries of one image are joined).

    ``path`` is a file, or a folder with ``split``. ``format`` overrules what the file looks like, ``images`` the folder
    that image names are relative to. A split may end in a condition on numeric image ids, ``val2017[id%5==0]`` or
    ``[id%5!=0]``. With ``text_only`` images are neither needed nor looked for: ``image`` is None.

    Raises DataError where there is no such file or split, or nothing usable in it.
    """
    split, chosen = _selection(split)
    source = _find(Path(path), split, "captions")
    found = format or _recognise(source)
    base = Path(images) if images is not None else _image_folder(source, found)
    reading = _Reading(source, found, base.absolute())
    if found == "flickr8k":
        entries: Iterable[_Entry] = _csv_entries(reading)
    elif found == "coco":
        entries = _coco_entries(reading)
    else:
        entries = _json_entries(reading)

    joined: dict[str, tuple[Path | None, list[str]]] = {}
    for entry in entries:
        try:
            image, captions = None if text_only else entry.path("image"), entry.texts("caption")
            joined.setdefault(entry.image_id(), (image, []))[1].extend(captions)
        except DataError as error:
            reading.broken.append(error)
    records = [
        CaptionRecord(image, tuple(captions), image_id)
        for image_id, (image, captions) in joined.items()
        if chosen(image_id) and (image is None or reading.exists(image))
    ]
    return reading.result(records)


def read_questions(path: str | Path, split: str | None = None) -> Records[QuestionRecord]:
    """``questions.jsonl``: {"image", "question", "answer": STR or [STR], "kind"}.

    Repeated answers of a list are counted: ``weights`` are relative frequencies.
    """

    def parse(entry: _Entry) -> QuestionRecord:
        counts = Counter(entry.texts("answer"))
        total = sum(counts.values())
        kind = entry.values.get("kind", "")
        if not isinstance(kind, str):
            raise entry.fault("kind", "a word")
        return QuestionRecord(
            entry.path("image"), entry.text("question"), tuple(counts), tuple(n / total for n in counts.values()), kind
        )

    return _read(path, split, "questions", parse)


def read_phrases(path: str | Path, split: str | None = None) -> Records[PhraseRecord]:
    """``phrases.jsonl``: {"image", "phrase", "box": [x0, y0, x1, y1] in pixels, "size": [width, height]}."""

    def parse(entry: _Entry) -> PhraseRecord:
        width, height = entry.numbers("size", 2, "[width, height] of the image in pixels")
        if width <= 0 or height <= 0:
            raise entry.fault("size", "a positive width and height")
        x0, y0, x1, y1 = entry.numbers("box", 4, "[x0, y0, x1, y1] in pixels")
        # Annotations often reach a pixel over the border; a box that is mostly outside belongs to another image.
        if not (-2 <= x0 < x1 <= width + 2 and -2 <= y0 < y1 <= height + 2):
            raise entry.fault("box", f"x0 < x1 and y0 < y1 inside the image of {width:g} x {height:g} pixels")
        box = tuple(min(max(v, 0.0), 1.0) for v in (x0 / width, y0 / height, x1 / width, y1 / height))
        return PhraseRecord(entry.path("image"), entry.text("phrase"), box)  # type: ignore[arg-type]

    return _read(path, split, "phrases", parse)


def read_statements(path: str | Path, split: str | None = None) -> Records[StatementRecord]:
    """``statements.jsonl``: {"images": [PATH, PATH], "statement", "label": true or false}."""

    def parse(entry: _Entry) -> StatementRecord:
        label = entry.values.get("label")
        if isinstance(label, str) and label.lower() in ("true", "false"):
            label = label.lower() == "true"
        if not isinstance(label, bool):
            raise entry.fault("label", "true or false")
        return StatementRecord(entry.pair("images"), entry.text("statement"), label)

    return _read(path, split, "statements", parse)


def read_entailments(path: str | Path, split: str | None = None) -> Records[EntailmentRecord]:
    """``entailments.jsonl``: {"image", "hypothesis", "label": "entailment", "neutral" or "contradiction"}."""

    def parse(entry: _Entry) -> EntailmentRecord:
        label = entry.values.get("label")
        if label not in ENTAILMENT_LABELS:
            raise entry.fault("label", f"one of {', '.join(ENTAILMENT_LABELS)}")
        return EntailmentRecord(entry.path("image"), entry.text("hypothesis"), label)

    return _read(path, split, "entailments", parse)


def _read(path: str | Path, split: str | None, name: str, parse: Callable[[_Entry], R]) -> Records[R]:
    source = _find(Path(path), split, name)
    found = _recognise(source)
    if found not in ("jsonl", "json"):
        raise DataError(f"{source} holds captions, not {name}", f"give a {name}.jsonl")
    reading = _Reading(source, found, source.parent.absolute())
    records: list[R] = []
    for entry in _json_entries(reading):
        try:
            record = parse(entry)
        except DataError as error:
            reading.broken.append(error)
            continue
        images = record.images if isinstance(record, StatementRecord) else (record.image,)
        # A list, not a generator: of a pair both images are looked for.
        if all([reading.exists(image) for image in images if image is not None]):
            records.append(record)
    return reading.result(records)


class _Reading:
    """One file being read: where images are, and what went wrong so far."""

    def __init__(self, source: Path, format: Format, base: Path) -> None:
        self.source, self.format, self.base = source, format, base
        self.broken: list[DataError] = []
        self._seen: dict[Path, bool] = {}

    def exists(self, image: Path) -> bool:
        if image not in self._seen:
            self._seen[image] = os.path.isfile(image)
        return self._seen[image]

    def result(self, records: list[R]) -> Records[R]:
        missing = [image for image, there in self._seen.items() if not there]
        if not records:
            if self.broken:
                more = f" (and {len(self.broken) - 1} more)" if len(self.broken) > 1 else ""
                raise DataError(f"nothing in {self.source} can be used: {self.broken[0].message}{more}", "correct it")
            if missing:
                raise DataError(
                    f"none of the {_count(len(missing), 'image')} of {self.source} is there; the first is {missing[0]}",
                    "put the images there, or give their folder; captions alone can be read as text only",
                )
            raise DataError(f"{self.source} has no records", "give a file with at least one")
        return Records(records, self.source, self.format, missing, self.broken)


class _Entry:
    """One entry of a file, with checked access to its fields."""

    def __init__(self, where: str, values: dict[str, Any], base: Path) -> None:
        self.where, self.values, self.base = where, values, base

    def fault(self, name: str, expected: str) -> DataError:
        if name not in self.values:
            return DataError(f'{self.where}: field "{name}" is missing, expected {expected}')
        got = json.dumps(self.values[name], ensure_ascii=False, default=str)
        return DataError(f'{self.where}: field "{name}": expected {expected}, got {got[:80]}')

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(name, "a text")
        return value.strip()

    def texts(self, name: str) -> list[str]:
        value = self.values.get(name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self.fault(name, "a text or a list of texts")
        texts = [v.strip() for v in values if v.strip()]
        if not texts:
            raise self.fault(name, "at least one text that is not empty")
        return texts

    def path(self, name: str) -> Path:
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise self.fault(name, "the path of an image")
        return self.base / value

    def pair(self, name: str) -> tuple[Path, Path]:
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str) and v for v in value):
            raise self.fault(name, "the paths of two images")
        return self.base / value[0], self.base / value[1]

    def numbers(self, name: str, count: int, expected: str) -> list[float]:
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.fault(name, expected)
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value):
            raise self.fault(name, expected)
        return [float(v) for v in value]

    def image_id(self) -> str:
        value = self.values.get("image_id", self.values.get("image", self.where))
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.fault("image_id", "a number or a text")
        return str(value)


def _selection(split: str | None) -> tuple[str | None, Callable[[str], bool]]:
    """``val2017[id%5==0]``: the split, and the test of image ids that are numbers; all pass without brackets."""
    match = re.fullmatch(r"(.*)\[id%(\d+)(==|!=)(\d+)\]", split or "")
    if match is None:
        return split, lambda image_id: True
    divisor, remainder, equal = int(match[2]), int(match[4]), match[3] == "=="
    if divisor == 0:
        raise DataError(f"split {split}: ids can't be divided by 0", "write val2017[id%5==0], for example")

    def chosen(image_id: str) -> bool:
        digits = re.search(r"(\d+)\D*$", image_id)
        return (digits is not None and int(digits[1]) % divisor == remainder) == equal

    return match[1] or None, chosen


def _find(path: Path, split: str | None, name: str) -> Path:
    """The file of ``name`` ("captions", "questions", ...) and ``split`` at a path that a user gave."""
    if path.is_file():
        if split is not None:
            raise DataError(f"{path} is one file: it has no split {split}", "name the split's file, or a folder")
        return path
    if not path.is_dir():
        raise DataError(f"there is no data at {path}", "check the path")
    splits = _splits(path, name)
    if split is not None:
        if split in splits:
            return splits[split]
        # "val" for annotations/captions_val2017.json, where it is the only one.
        longer = [key for key in splits if key.startswith(split)]
        if len(longer) == 1:
            return splits[longer[0]]
        near = get_close_matches(split, splits, 1)
        hint = f"there are {', '.join(sorted(splits))}" if splits else f"expected {split}/{name}.jsonl there"
        raise DataError(f"{path} has no {name} of split {split}" + (f": is it {near[0]}?" if near else ""), hint)
    for extension in _EXTENSIONS:
        if (path / f"{name}{extension}").is_file():
            return path / f"{name}{extension}"
    if len(splits) == 1:
        return next(iter(splits.values()))
    if splits:
        raise DataError(f"{path} has several splits of {name}", f"name one of {', '.join(sorted(splits))}")
    raise DataError(f"there are no {name} in the folder {path}", f"expected {name}.jsonl there; or name the file")


def _splits(folder: Path, name: str) -> dict[str, Path]:
    """Split -> file: captions_val.txt, annotations/captions_val2017.json, val/captions.jsonl."""
    splits: dict[str, Path] = {}
    for place in (folder, folder / "annotations"):
        if place.is_dir():
            for file in sorted(place.glob(f"{name}_*")):
                if file.suffix in _EXTENSIONS and file.is_file():
                    splits.setdefault(file.stem[len(name) + 1 :], file)
    for file in sorted(folder.glob(f"*/{name}.jsonl")):
        splits.setdefault(file.parent.name, file)
    return splits


def _recognise(source: Path) -> Format:
    """The format by the first bytes: a CSV header, JSON Lines, a JSON list, or COCO's object with annotations."""
    try:
        with open(source, "rb") as file:
            start = file.read(1 << 16)
    except OSError as error:
        raise DataError(f"{source} can't be read: {error.strerror}", "check the file") from error
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise DataError(f"{source} is empty", "give a file with records")
    line = text.split(b"\n", 1)[0].strip()
    if line.replace(b" ", b"").replace(b'"', b"").lower() == b"image,caption":
        return "flickr8k"
    if text.startswith(b"["):
        return "json"
    if text.startswith(b"{"):
        # One object a line is JSON Lines, also where the first is broken; an object over several lines is COCO's.
        try:
            return "coco" if "annotations" in json.loads(line) else "jsonl"
        except ValueError:
            return "jsonl" if len(line) > 1 and (line.endswith(b"}") or b"\n{" in text) else "coco"
    raise DataError(
        f"{source} is in no known format",
        'expected JSON Lines {"image": ..., "caption": ...}, COCO captions JSON, or CSV with the header image,caption',
    )


def _image_folder(source: Path, format: Format) -> Path:
    """Where a layout keeps the images of an annotation file."""
    folder = source.absolute().parent
    if format == "flickr8k":
        places = [folder / name for name in _FLICKR_FOLDERS]
    elif format == "coco":
        split = source.stem.partition("_")[2]
        places = [folder.parent / split, folder.parent / "images" / split, folder / split] if split else []
        places += [folder.parent / "images", folder / "images"]
    else:
        places = []
    return next((place for place in places if place.is_dir()), places[0] if places else folder)


def _json_entries(reading: _Reading) -> Iterator[_Entry]:
    if reading.format == "json":
        items = _load(reading.source)
        if not isinstance(items, list):
            raise DataError(f"{reading.source}: expected a list of objects, got {type(items).__name__}", "correct it")
        numbered = ((f"{reading.source}: entry {index}", item) for index, item in enumerate(items))
    else:
        numbered = _json_lines(reading)
    for where, item in numbered:
        if isinstance(item, dict):
            yield _Entry(where, item, reading.base)
        else:
            reading.broken.append(DataError(f"{where}: expected a JSON object {{...}}, got {json.dumps(item)[:60]}"))


def _json_lines(reading: _Reading) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(reading):
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            reading.broken.append(DataError(f"{where}: expected a JSON object on the line: {reason}"))
            continue
        yield where, item


def _csv_entries(reading: _Reading) -> Iterator[_Entry]:
    lines = _lines(reading)
    next(lines, None)  # the header
    for where, line in lines:
        # Line by line, so that an unbalanced quote can't swallow the records after it.
        try:
            fields = next(csv.reader([line], strict=True))
        except csv.Error as error:
            reading.broken.append(DataError(f'{where}: field "caption": expected balanced quotes: {error}'))
            continue
        if len(fields) > 2:  # commas in a caption without quotes
            fields = line.split(",", 1)
        values = dict(zip(("image", "caption"), fields, strict=False))
        if image := values.get("image"):
            values["image_id"] = Path(image).stem
        yield _Entry(where, values, reading.base)


def _coco_entries(reading: _Reading) -> Iterator[_Entry]:
    data = _load(reading.source)
    tables: dict[str, list[Any]] = {}
    for name in ("images", "annotations"):
        table = data.get(name) if isinstance(data, dict) else None
        if not isinstance(table, list):
            raise DataError(f'{reading.source}: field "{name}": expected a list, as in COCO captions', "correct it")
        tables[name] = table
    names: dict[int | str, Any] = {}
    for index, image in enumerate(tables["images"]):
        if isinstance(image, dict) and isinstance(image.get("id"), int | str):
            names[image["id"]] = image.get("file_name")
        else:
            reading.broken.append(DataError(f'{reading.source}: images[{index}]: field "id": expected a number'))
    for index, annotation in enumerate(tables["annotations"]):
        where = f"{reading.source}: annotations[{index}]"
        entry = _Entry(where, annotation if isinstance(annotation, dict) else {}, reading.base)
        image_id = entry.values.get("image_id")
        if not isinstance(image_id, int | str) or image_id not in names:
            reading.broken.append(entry.fault("image_id", 'the id of an entry of "images"'))
            continue
        entry.values["image"] = names[image_id]
        yield entry


def _lines(reading: _Reading) -> Iterator[tuple[str, str]]:
    """(file:line, text) of the lines that are not blank; those that are not UTF-8 are broken."""
    with open(reading.source, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{reading.source}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                byte = f"0x{raw[error.start]:02x}"
                reading.broken.append(DataError(f"{where}: expected UTF-8 text, got the byte {byte}"))
                continue
            if text and not text.isspace():
                yield where, text


def _load(source: Path) -> Any:
    try:
        return json.loads(source.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text", "save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source}:{error.lineno}: expected JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{source}: nested too deeply") from error


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
