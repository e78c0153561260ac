"""Phrases and the box of what each means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mplug_core.data.records import entities
from mplug_core.data.records.files import File
from mplug_core.data.records.finding import read
from mplug_core.data.records.pickled_refs import as_text
from mplug_core.data.records.questions import coco_names
from mplug_core.data.records.reading import (
    Entry,
    Item,
    Layout,
    Reading,
    images_by_id,
    is_id,
    objects,
    own_entries,
    own_folder,
    places,
    repeats,
    table,
    table_entries,
)
from mplug_core.data.records.types import Format, PhraseRecord, Records
from mplug_core.errors import DataError

_COCO_FOLDERS = (
    "images", "train2014", "train2017", "val2017", "val2014", "images/train2014", "images/mscoco/images/train2014",
    "mscoco/images/train2014",
)  # fmt: skip


def read_phrases(
    path: str | Path,
    split: str | None = None,
    format: Format | None = None,
    images: str | Path | None = None,
) -> Records[PhraseRecord]:
    """Phrases, in the order of the file; arguments as of :func:`read_captions`.

    Own format: {"image", "phrase", "box": [x0, y0, x1, y1] in pixels, "size": [width, height]}.

    RefCOCO, RefCOCO+ and RefCOCOg are a folder with ``refs(unc).p`` (or ``umd``, ``google``) and ``instances.json``;
    each sentence is a record. A path to a ``refs(...).p`` chooses among several. The pickle is read without running it.
    ``coco_boxes`` is COCO's instances JSON: a category that an image has exactly one of is a phrase. ``entities`` is
    the folder of Flickr30k Entities: each marked phrase that has a box is a record, several boxes are one around all.

    Raises DataError where there is no such file or split, or nothing usable in it.
    """
    return read("phrases", path, split, format, images)


def _own(entry: Entry) -> Iterable[Item]:
    width, height = entry.numbers("size", 2, "[width, height] of the image in pixels")
    if width <= 0 or height <= 0:
        raise entry.fault("size", "a positive width and height")
    x0, y0, x1, y1 = entry.numbers("box", 4, "[x0, y0, x1, y1] in pixels")
    box = _shares(entry, "box", (x0, y0, x1, y1), width, height)
    phrase_id = entry.identity("phrase_id", default="")
    size, kind = _size(width, height), entry.word("kind")
    record = PhraseRecord(entry.path("image"), entry.text("phrase"), box, phrase_id, size, kind)  # type: ignore[arg-type]
    key = repeats(f"phrase_id {phrase_id}", str(entry.values.get("image")), record.phrase, record.box)
    return [Item(entry.image_id(), record, key if phrase_id else record)]


def _shares(
    entry: Entry, name: str, box: tuple[float, float, float, float], width: float, height: float
) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    # Annotations often reach a pixel over the border; a box that is mostly outside belongs to another image.
    if not (-2 <= x0 < x1 <= width + 2 and -2 <= y0 < y1 <= height + 2 and x0 < width and y0 < height):
        raise entry.fault(name, f"x0 < x1 and y0 < y1 inside the image of {width:g} x {height:g} pixels")
    if x1 <= 0 or y1 <= 0:
        raise entry.fault(name, "a box inside the image")
    return tuple(min(max(v, 0.0), 1.0) for v in (x0 / width, y0 / height, x1 / width, y1 / height))  # type: ignore[return-value]


def _size(width: float, height: float) -> tuple[int, int]:
    return round(width), round(height)


def _refs(reading: Reading) -> Iterator[Entry]:
    """A sentence an entry, with the ref that it belongs to, its annotation and its image."""
    document = _instances(reading)
    like = "COCO instances"
    images = images_by_id(reading, like, document.value, document.path)
    rows = table(reading, "annotations", like, document.value, document.path)
    boxes = {row["id"]: row for row in rows if isinstance(row, dict) and is_id(row.get("id"))}
    refs = reading.file.value
    if not isinstance(refs, list):
        raise DataError(f"{reading.path}: expected a list of refs, got {type(refs).__name__}", "correct it")
    for ref in objects(reading, ((f": ref {index}", ref) for index, ref in enumerate(refs))):
        split = ref.values.get("split")
        if not isinstance(split, str):
            reading.broken.append(ref.fault("split", "the name of a split"))
        elif reading.inner in (None, split):
            yield from _sentences(reading, ref, images, boxes)


def _sentences(
    reading: Reading, ref: Entry, images: dict[int | str, Any], boxes: dict[int | str, Any]
) -> Iterator[Entry]:
    for name, known, what in (("image_id", images, "image"), ("ann_id", boxes, "annotation")):
        value = ref.values.get(name)
        if not is_id(value) or value not in known:
            reading.broken.append(ref.fault(name, f"the id of an {what} in instances.json"))
            return
    sentences = ref.values.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        reading.broken.append(ref.fault("sentences", "a list of sentences"))
        return
    where = ref.where.removeprefix(str(reading.path))
    known = {"image": images[ref.values["image_id"]], "annotation": boxes[ref.values["ann_id"]]}
    for entry in objects(reading, ((f"{where}: sentences[{i}]", sentence) for i, sentence in enumerate(sentences))):
        entry.values = {**entry.values, "ref": ref.values, **known}
        yield entry


def _instances(reading: Reading) -> File:
    names = ("instances.json", "instances.json.gz")
    found = next((p for name in names if (p := reading.path.parent / name).is_file()), None)
    if found is None:
        raise DataError(f"there is no instances.json beside {reading.path}", "put it there: the boxes are in it")
    return File(found)


def _ref_item(entry: Entry) -> Iterable[Item]:
    ref, image = entry.values["ref"], entry.values["image"]
    image_id = str(ref["image_id"])
    name = "sent" if isinstance(entry.values.get("sent"), str) and entry.values["sent"].strip() else "raw"
    phrase = as_text(entry.text(name))
    box, size = _instance_box(entry, entry.values["annotation"], image)
    sentence_id = entry.identity("sent_id", default="")
    path = entry.reading.image(*_ref_names(ref, image, image_id))
    record = PhraseRecord(path, phrase, box, sentence_id, size)  # type: ignore[arg-type]
    return [Item(image_id, record, f"sent_id {sentence_id}" if sentence_id else record)]


def _ref_names(ref: dict[str, Any], image: dict[str, Any], image_id: str) -> tuple[str, ...]:
    """The image's own name, the ref's without the number of its annotation, and COCO's forms."""
    names = [image.get("file_name")]
    if isinstance(ref.get("file_name"), str):
        names.append(re.sub(r"_\d+(\.\w+)$", r"\1", ref["file_name"]) if ref["file_name"].count("_") > 2 else None)
    known = [name for name in names if isinstance(name, str) and name and "\0" not in name]
    return tuple(dict.fromkeys([*known, *coco_names(image_id, "train2014")]))


def _instance_box(
    entry: Entry, annotation: dict[str, Any], image: dict[str, Any]
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Shares of COCO's ``bbox`` (x, y, width, height), and the image's size."""
    checked = Entry(entry.reading, "", {**annotation, "size": [image.get("width"), image.get("height")]})
    checked.where = entry.where
    width, height = checked.numbers("size", 2, "the width and height of the image in pixels")
    x, y, w, h = checked.numbers("bbox", 4, "[x, y, width, height] in pixels")
    if width <= 0 or height <= 0:
        raise checked.fault("size", "a positive width and height")
    return _shares(checked, "bbox", (x, y, x + w, y + h), width, height), _size(width, height)


def _ref_splits(file: File) -> list[str]:
    refs = file.value if isinstance(file.value, list) else []
    found = (ref.get("split") for ref in refs if isinstance(ref, dict))
    return list(dict.fromkeys(split for split in found if isinstance(split, str)))


def _coco_boxes(reading: Reading) -> Iterator[Entry]:
    """Of COCO's instances those whose category occurs once on their image and is no crowd."""
    like = "COCO instances"
    images = images_by_id(reading, like)
    categories = table(reading, "categories", like)
    names = {row["id"]: row.get("name") for row in categories if isinstance(row, dict) and is_id(row.get("id"))}
    entries = []
    for entry in table_entries(reading, "annotations", like):
        faults = [
            entry.fault(name, f'the id of an entry of "{rows}"')
            for name, known, rows in (("image_id", images, "images"), ("category_id", names, "categories"))
            if not is_id(entry.values.get(name)) or entry.values[name] not in known
        ]
        if faults:
            reading.broken.append(faults[0])
        else:
            entries.append(entry)
    # A crowd counts, too: "person" would be more than one.
    counts = Counter((entry.values["image_id"], entry.values["category_id"]) for entry in entries)
    for entry in entries:
        key = (entry.values["image_id"], entry.values["category_id"])
        if counts[key] == 1 and not entry.values.get("iscrowd"):
            entry.values = {**entry.values, "image": images[key[0]], "phrase": names[key[1]]}
            yield entry


def _coco_item(entry: Entry) -> Iterable[Item]:
    image_id = str(entry.values["image_id"])
    image = entry.values["image"]
    name = Entry(entry.reading, "", image)
    name.where = f"{entry.where}: image {image_id}"
    box, size = _instance_box(entry, entry.values, image)
    path = entry.reading.image(*dict.fromkeys((name.name("file_name"), *coco_names(image_id, entry.reading.file.stem))))
    phrase_id = entry.identity("id", default="")
    record = PhraseRecord(path, entry.text("phrase"), box, phrase_id, size)  # type: ignore[arg-type]
    key = repeats(f"id {phrase_id}", image_id, record.phrase, record.box)
    return [Item(image_id, record, key if phrase_id else record)]


def _coco_folders(reading: Reading) -> list[Path]:
    split = reading.file.stem.partition("_")[2]
    return places(*filter(None, (split, split and f"images/{split}", *_COCO_FOLDERS)))(reading)


def _entities(reading: Reading) -> Iterator[Entry]:
    """Flickr30k Entities: a phrase an entry; those without a box (the scene, what is not to be seen) are left out."""
    for image in entities.images(reading):
        found = entities.boxes(reading, image.image_id)
        mentions: Counter[str] = Counter()
        for number, sentence in enumerate(image.sentences, 1) if found is not None else ():
            for entity, phrase in entities.phrases(sentence):
                if entity not in found.around:
                    continue
                mentions[entity] += 1
                values = {
                    "image": f"{image.image_id}.jpg",
                    "image_id": image.image_id,
                    "phrase": phrase,
                    "box": found.around[entity],
                    "size": found.size,
                    "phrase_id": f"{image.image_id}/{entity}/{mentions[entity]}",
                }
                yield Entry(reading, f"{image.where}: sentence {number}", values)


def _is_refs(file: File) -> bool:
    if file.shape == "pickle":
        return True
    return file.name.startswith("refs(") and file.shape == "list"


def _is_instances(file: File) -> bool:
    return file.shape == "object" and isinstance(file.value, dict) and isinstance(file.value.get("categories"), list)


LAYOUTS = (
    Layout(
        "refcoco", _is_refs, _refs, _ref_item, places(*_COCO_FOLDERS),
        (r"refs\(unc\)\.(p|json)", r"refs\(umd\)\.(p|json)", r"refs\(google\)\.(p|json)", r"refs\(\w+\)\.(p|json)"),
        inside=_ref_splits,
    ),
    Layout(
        "coco_boxes", _is_instances, _coco_boxes, _coco_item, _coco_folders, (r"instances_(?P<split>\w+)\.json",),
    ),
    Layout(
        "entities", entities.has_boxes, _entities, _own, places(*entities.FLICKR_FOLDERS), inside=entities.splits,
    ),
    Layout("json", lambda file: file.shape == "list", own_entries, _own, own_folder),
    Layout("jsonl", lambda file: file.shape == "lines", own_entries, _own, own_folder),
)  # fmt: skip
