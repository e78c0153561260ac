"""Captions: one record an image, with all of its captions."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mplug_core.data.records.files import File
from mplug_core.data.records.finding import read
from mplug_core.data.records.reading import (
    Entry,
    Item,
    Layout,
    Reading,
    images_by_id,
    is_id,
    lines,
    own_entries,
    own_folder,
    places,
    table,
    table_entries,
)
from mplug_core.data.records.types import CaptionRecord, Format, Records
from mplug_core.errors import DataError

_FLICKR_FOLDERS = (
    "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images",
    "flickr30k_images/flickr30k_images",
)  # fmt: skip
_MARKUP = re.compile(r"\[/EN#\d+(?:/[^\s\]]+)* ?([^\]]*)\]")
_TOKEN = re.compile(r"([^\t]+)#(\d+)\t(.*)")
_FLICKR8K_LISTS = "Flickr_8k.{split}Images.txt"


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

    Of Karpathy's JSON, ``train`` has the images that it calls train and restval, as results on COCO are reported;
    ``restval`` has those alone.

    Raises DataError where there is no such file or split, or nothing usable in it.
    """
    return read("captions", path, split, format, images, text_only)


def _own(entry: Entry) -> Iterable[Item]:
    record = CaptionRecord(entry.path("image"), tuple(entry.texts("caption")), entry.image_id(), entry.word("domain"))
    # Without an id, one text twice is taken for one line twice.
    key = record if "image" in entry.values or "image_id" in entry.values else None
    return [Item(record.image_id, record, key)]


def _by_name(entry: Entry) -> Iterable[Item]:
    """Entries with the name of an image, whose stem is its id."""
    image_id = Path(entry.name("image")).stem
    record = CaptionRecord(entry.path("image"), tuple(entry.texts("caption")), image_id)
    return [Item(image_id, record, entry.values.get("key"))]


def _csv_lines(reading: Reading) -> Iterator[Entry]:
    """Flickr8k: ``image,caption``."""
    numbered = lines(reading)
    next(numbered, None)  # the header
    for where, line in numbered:
        fields = csv_fields(reading, where, line, "caption")
        if fields is None:
            continue
        if len(fields) > 2:  # commas in a caption without quotes
            fields = line.split(",", 1)
        yield Entry(reading, where, dict(zip(("image", "caption"), fields, strict=False)))


def csv_fields(reading: Reading, where: str, line: str, name: str) -> list[str] | None:
    """Line by line, so that an unbalanced quote can't swallow the records after it."""
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except (csv.Error, StopIteration) as error:
        reading.fault(where, f'field "{name}": expected balanced quotes: {error}')
        return None


def _bar_lines(reading: Reading) -> Iterator[Entry]:
    """Flickr30k's results.csv: ``image_name| comment_number| comment``."""
    numbered = lines(reading)
    next(numbered, None)
    for where, line in numbered:
        fields = [field.strip() for field in line.split("|", 2)]
        values = dict(zip(("image", "number", "caption"), fields, strict=False))
        if len(fields) == 3:
            values["key"] = f"caption {fields[1]} of {fields[0]}"
        yield Entry(reading, where, values)


def _token_lines(reading: Reading) -> Iterator[Entry]:
    """Flickr8k.token.txt and Flickr30k's results_20130124.token: ``img.jpg#0<TAB>caption``."""
    wanted = None
    if reading.inner is not None:
        names = File(_flickr8k_list(reading.path, reading.inner))
        wanted = {line.strip() for _, line in lines(reading, names)}
    for where, line in lines(reading):
        match = _TOKEN.fullmatch(line)
        if match is None:
            reading.fault(where, "expected IMAGE#NUMBER, a tab and a caption")
        elif wanted is None or match[1].strip() in wanted:
            values = {"image": match[1].strip(), "caption": match[3], "key": f"{match[1]}#{match[2]}"}
            yield Entry(reading, where, values)


def _flickr8k_list(file: Path, split: str) -> Path:
    return file.parent / _FLICKR8K_LISTS.format(split=split)


def _token_splits(file: File) -> list[str]:
    if not file.name.startswith("Flickr8k"):
        return []
    return [split for split in ("train", "dev", "test") if _flickr8k_list(file.path, split).is_file()]


def _entities_folder(file: File) -> bool:
    return file.shape == "folder" and _sentences(file.path).is_dir()


def _sentences(folder: Path) -> Path:
    return folder if folder.name.lower() == "sentences" else folder / _first_there(folder, ("sentences", "Sentences"))


def _first_there(folder: Path, names: tuple[str, ...]) -> str:
    return next((name for name in names if (folder / name).is_dir()), names[0])


def _entities_splits(file: File) -> list[str]:
    """``train.txt``, ``val.txt``, ``test.txt`` (or others) beside ``sentences/`` list the ids of a split."""
    return [list.stem for list in sorted(_sentences(file.path).parent.glob("*.txt")) if list.stem.lower() != "readme"]


def _entities(reading: Reading) -> Iterator[Entry]:
    """Flickr30k Entities: ``sentences/ID.txt``, whose phrases are marked ``[/EN#id/type phrase]``."""
    folder = _sentences(reading.path)
    if not folder.is_dir():
        raise DataError(f"{reading.path} has no folder sentences", "give the folder of Flickr30k Entities")
    if reading.inner is None:
        ids = sorted(file.stem for file in folder.glob("*.txt"))
    else:
        ids = [line.strip() for _, line in lines(reading, File(folder.parent / f"{reading.inner}.txt"))]
    for image_id in ids:
        where = f"/{folder.relative_to(reading.path)}/{image_id}.txt" if folder != reading.path else f"/{image_id}.txt"
        file = File(folder / f"{image_id}.txt")
        if not os.path.isfile(file.path):
            reading.fault(where, f"expected the sentences of image {image_id}, there is no such file")
            continue
        texts = [_MARKUP.sub(r"\1", line).strip() for _, line in lines(reading, file)]
        yield Entry(reading, where, {"image": f"{image_id}.jpg", "caption": texts, "key": f"image {image_id}"})


def _coco(reading: Reading) -> Iterator[Entry]:
    images = images_by_id(reading, "COCO captions")
    for entry in table_entries_or_empty(reading):
        image_id = entry.values.get("image_id")
        if not is_id(image_id) or image_id not in images:
            reading.broken.append(entry.fault("image_id", 'the id of an entry of "images"'))
            continue
        image = images[image_id]
        key = entry.values.get("id")
        yield Entry(
            reading,
            entry.where.removeprefix(str(reading.path)),
            {
                **entry.values,
                "image": image.get("file_name"),
                "domain": image.get("domain") or "",
                "key": f"id {key}" if is_id(key) else None,
            },
        )


def table_entries_or_empty(reading: Reading) -> Iterator[Entry]:
    """COCO's annotations; what is no object counts as an object without fields."""
    for index, item in enumerate(table(reading, "annotations", "COCO captions")):
        yield Entry(reading, f": annotations[{index}]", item if isinstance(item, dict) else {})


def _coco_item(entry: Entry) -> Iterable[Item]:
    image_id = entry.identity("image_id")
    captions = tuple(entry.texts("caption"))
    record = CaptionRecord(entry.path("image"), captions, image_id, entry.word("domain"))
    return [Item(image_id, record, entry.values["key"])]


def _coco_folders(reading: Reading) -> list[Path]:
    """``annotations/captions_SPLIT.json``: images in ``SPLIT/`` beside ``annotations/``."""
    if reading.images is not None:
        return [reading.images]
    folder, split = reading.beside, reading.file.stem.partition("_")[2]
    found = [folder.parent / split, folder.parent / "images" / split, folder / split] if split else []
    return [*found, folder.parent / "images", folder / "images"]


def _nocaps_folders(reading: Reading) -> list[Path]:
    split = "test" if "test" in reading.file.stem else "val"
    return places("images", f"images/{split}", split, "validation", f"nocaps_{split}")(reading)


def _karpathy(reading: Reading) -> Iterator[Entry]:
    wanted = ("train", "restval") if reading.inner == "train" else (reading.inner,)
    for entry in table_entries(reading, "images", "Karpathy's JSON"):
        split = entry.values.get("split")
        if not isinstance(split, str):
            reading.broken.append(entry.fault("split", "the name of a split"))
        elif reading.inner is None or split in wanted:
            yield entry


def _karpathy_item(entry: Entry) -> Iterable[Item]:
    sentences = entry.values.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
        raise entry.fault("sentences", 'a list of objects with "raw"')
    captions = Entry(entry.reading, "", {"raw": [sentence.get("raw", "") for sentence in sentences]})
    captions.where = f"{entry.where}.sentences"
    name = entry.name("filename")
    folder = entry.word("filepath")
    image_id = entry.identity("cocoid" if "cocoid" in entry.values else "imgid")
    image = entry.reading.image(*((f"{folder}/{name}", name) if folder else (name,)))
    return [Item(image_id, CaptionRecord(image, tuple(captions.texts("raw")), image_id), f"image {image_id}")]


def _karpathy_splits(file: File) -> list[str]:
    images = file.value.get("images") if isinstance(file.value, dict) else None
    found = [image.get("split") for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    return list(dict.fromkeys(split for split in found if isinstance(split, str)))


def _first(file: File, name: str) -> dict[str, Any]:
    """The first object of a list in a document, or an empty one."""
    rows = file.value.get(name) if file.shape == "object" and isinstance(file.value, dict) else None
    return next((row for row in rows[:5] if isinstance(row, dict)), {}) if isinstance(rows, list) else {}


def _is_karpathy(file: File) -> bool:
    return "sentences" in _first(file, "images")


def _is_coco(file: File) -> bool:
    if file.shape != "object" or not isinstance(file.value, dict) or "questions" in file.value:
        return False
    first = _first(file, "annotations")
    known = "annotations" in file.value or "images" in file.value
    return known and ("caption" in first or not {"bbox", "question_id", "answers"} & set(first))


def _is_nocaps(file: File) -> bool:
    first = _first(file, "images")
    return _is_coco(file) and ("domain" in first or "open_images_id" in first)


def _header(file: File) -> str:
    return file.line.replace(" ", "").replace('"', "").lower() if file.shape == "text" else ""


LAYOUTS = (
    Layout(
        "flickr8k", lambda file: _header(file) == "image,caption", _csv_lines, _by_name,
        places(*_FLICKR_FOLDERS, above=False),
    ),
    Layout(
        "flickr30k", lambda file: _header(file).startswith("image_name|"), _bar_lines, _by_name,
        places(*_FLICKR_FOLDERS), (r"results\.csv",),
    ),
    Layout(
        "token", lambda file: file.shape == "text" and _TOKEN.fullmatch(file.line) is not None, _token_lines, _by_name,
        places(*_FLICKR_FOLDERS), (r"Flickr8k\.(lemma\.)?token\.txt", r"results(_20130124)?\.token"),
        inside=_token_splits,
    ),
    Layout(
        "entities", _entities_folder, _entities, _by_name, places(*_FLICKR_FOLDERS), inside=_entities_splits,
    ),
    Layout(
        "karpathy", _is_karpathy, _karpathy, _karpathy_item,
        places(*_FLICKR_FOLDERS), (r"dataset(_coco|_flickr8k|_flickr30k)?\.json",), inside=_karpathy_splits,
    ),
    Layout(
        "nocaps", _is_nocaps, _coco, _coco_item, _nocaps_folders, (r"nocaps_(?P<split>\w+?)(_\d+)?_captions\.json",),
    ),
    Layout("coco", _is_coco, _coco, _coco_item, _coco_folders),
    Layout(
        "json", lambda file: file.shape == "list", own_entries, _own, own_folder,
        (r"coco_karpathy_(?P<split>\w+)\.json", r"flickr30k_(?P<split>train|val|test)\.json"),
    ),
    Layout("jsonl", lambda file: file.shape == "lines", own_entries, _own, own_folder),
)  # fmt: skip
