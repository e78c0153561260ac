"""Captions: one record an image, with all of its captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mplug_core.data.records import entities
from mplug_core.data.records.entities import FLICKR_FOLDERS
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
    repeats,
    table,
    table_entries,
)
from mplug_core.data.records.rows import Row, image_pairs, is_address, one_line, rows
from mplug_core.data.records.types import CaptionRecord, Format, Records

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
    key = entry.values.get("key")
    return [Item(image_id, record, None if key is None else repeats(key, *record.captions))]


def _csv_lines(reading: Reading) -> Iterator[Entry]:
    """Flickr8k: ``image,caption``."""
    for row in csv_rows(reading, "caption"):
        image, *rest = row.fields
        # commas in a caption without quotes
        caption = row.line.split(",", 1)[1] if len(rest) > 1 else one_line(rest[0]) if rest else None
        yield Entry(reading, row.where, {"image": image} | ({} if caption is None else {"caption": caption}))


def csv_rows(reading: Reading, name: str) -> Iterator[Row]:
    """The rows of a CSV behind its header; those that are none are broken, by the field ``name``."""
    numbered = rows(lines(reading), ",")
    next(numbered, None)
    for row in numbered:
        if row.fault:
            reading.fault(row.where, f'field "{name}": expected balanced quotes: {row.fault}')
        else:
            yield row


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


def _tsv(reading: Reading) -> Iterator[Entry]:
    """Images and captions in columns; addresses of images are for packs, which download them."""
    for pair in image_pairs(lines(reading)):
        if pair.fault:
            reading.fault(pair.where, pair.fault)
        elif is_address(pair.image) and not reading.text_only:
            reading.fault(pair.where, "expected the path of an image, got an address: mplug data pack downloads it")
        else:
            yield Entry(reading, pair.where, {"image": pair.image.strip(), "caption": pair.caption})


def _tsv_item(entry: Entry) -> Iterable[Item]:
    record = CaptionRecord(entry.path("image"), tuple(entry.texts("caption")), str(entry.values["image"]))
    return [Item(record.image_id, record, repeats("image and caption are equal", record.image_id, *record.captions))]


def _is_tsv(file: File) -> bool:
    return file.shape == "text" and file.name.endswith((".tsv", ".tab")) and "\t" in file.line


def _token_splits(file: File) -> list[str]:
    if not file.name.startswith("Flickr8k"):
        return []
    return [split for split in ("train", "dev", "test") if _flickr8k_list(file.path, split).is_file()]


def _entities(reading: Reading) -> Iterator[Entry]:
    """Flickr30k Entities: an image an entry, its sentences without their markup."""
    for image in entities.images(reading):
        captions = [entities.plain(line) for line in image.sentences]
        values = {"image": f"{image.image_id}.jpg", "caption": captions, "key": f"image {image.image_id}"}
        yield Entry(reading, image.where, values)


def _coco(reading: Reading) -> Iterator[Entry]:
    images = images_by_id(reading, "COCO captions")
    for entry in table_entries_or_empty(reading):
        image_id = entry.values.get("image_id")
        if not is_id(image_id) or image_id not in images:
            reading.broken.append(entry.fault("image_id", 'the id of an entry of "images"'))
            continue
        image = images[image_id]
        yield Entry(
            reading,
            entry.where.removeprefix(str(reading.path)),
            {
                **entry.values,
                "image": image.get("file_name"),
                "domain": image.get("domain") or "",
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
    # ids of annotations start again with each image in some files
    return [Item(image_id, record, repeats(f"image {image_id}", *captions))]


def _coco_folders(reading: Reading) -> list[Path]:
    """``annotations/captions_SPLIT.json``: images in ``SPLIT/`` beside ``annotations/``."""
    if reading.images is not None:
        return [reading.images]
    folder, split = reading.beside, reading.file.stem.partition("_")[2]
    found = [folder.parent / split, folder.parent / "images" / split, folder / split] if split else []
    return [*found, folder.parent / "images", folder / "images", folder]


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
        places(*FLICKR_FOLDERS, above=False),
    ),
    Layout(
        "flickr30k", lambda file: _header(file).startswith("image_name|"), _bar_lines, _by_name,
        places(*FLICKR_FOLDERS), (r"results\.csv",),
    ),
    Layout(
        "token", lambda file: file.shape == "text" and _TOKEN.fullmatch(file.line) is not None, _token_lines, _by_name,
        places(*FLICKR_FOLDERS), (r"Flickr8k\.(lemma\.)?token\.txt", r"results(_20130124)?\.token"),
        inside=_token_splits,
    ),
    Layout("tsv", _is_tsv, _tsv, _tsv_item, own_folder),
    Layout(
        "entities", entities.has_sentences, _entities, _by_name, places(*FLICKR_FOLDERS), inside=entities.splits,
    ),
    Layout(
        "karpathy", _is_karpathy, _karpathy, _karpathy_item,
        places(*FLICKR_FOLDERS), (r"dataset(_coco|_flickr8k|_flickr30k)?\.json",), inside=_karpathy_splits,
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
