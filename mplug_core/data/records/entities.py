"""Flickr30k Entities: sentences whose phrases are marked, and the boxes of what they name.

``Sentences/ID.txt`` has a sentence a line, ``[/EN#ENTITY/TYPE PHRASE]`` marks a phrase. ``Annotations/ID.xml`` has the
boxes of each entity, or says that it is the scene or not in the picture. Lists of ids (``train.txt``, ...) beside these
folders are splits. Captions and phrases are both read from here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from mplug_core.data.records.files import DAMAGED, File
from mplug_core.data.records.reading import Reading, is_number, lines
from mplug_core.errors import DataError

FLICKR_FOLDERS = (
    "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images",
    "flickr30k_images/flickr30k_images",
)  # fmt: skip
"""Where people keep the photos of Flickr8k and Flickr30k."""

_MARKUP = re.compile(r"\[/EN#(\d+)([^\[\]]*)\]")
_NOT_VISUAL = "0"


class MarkedImage(NamedTuple):
    """The sentences of one image with their markup; ``where`` is their file, as messages name it."""

    image_id: str
    where: str
    sentences: list[str]


class Boxes(NamedTuple):
    """What an annotation file says: the image's size, and [x0, y0, x1, y1] in pixels around all boxes of an entity."""

    size: tuple[float, float]
    around: dict[str, list[float]]


def has_sentences(file: File) -> bool:
    return file.shape == "folder" and _sentences(file.path).is_dir()


def has_boxes(file: File) -> bool:
    return has_sentences(file) and _annotations(file.path).is_dir()


def splits(file: File) -> list[str]:
    """``train.txt``, ``val.txt``, ``test.txt`` (or others) beside ``Sentences/`` list the ids of a split."""
    return [list.stem for list in sorted(_sentences(file.path).parent.glob("*.txt")) if list.stem.lower() != "readme"]


def images(reading: Reading) -> Iterator[MarkedImage]:
    """The images of a split; those that have no sentences are broken."""
    folder = _sentences(reading.path)
    if not folder.is_dir():
        raise DataError(f"{reading.path} has no folder Sentences", "give the folder of Flickr30k Entities")
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
        yield MarkedImage(image_id, where, [line for _, line in lines(reading, file)])


def plain(sentence: str) -> str:
    """A sentence without its markup."""
    return _MARKUP.sub(lambda match: _phrase(match[2]), sentence).strip()


def phrases(sentence: str) -> list[tuple[str, str]]:
    """(entity, phrase) of what a sentence marks; without what it says is not visual."""
    return [(match[1], _phrase(match[2]).strip()) for match in _MARKUP.finditer(sentence) if match[1] != _NOT_VISUAL]


def _phrase(marked: str) -> str:
    """The words behind the types of an entity: ``/people/men A man`` has ``A man``."""
    return marked.partition(" ")[2] if marked.startswith(("/", " ")) else marked


def boxes(reading: Reading, image_id: str) -> Boxes | None:
    """The boxes of an image; None, and a broken entry, where its file can't be read. A broken box is one, too."""
    folder = _annotations(reading.path)
    where = f"/{os.path.relpath(folder, reading.path)}/{image_id}.xml"
    try:
        root = _root(folder / f"{image_id}.xml")
        size = _numbers(root.find("size"), ("width", "height"))
    except (ValueError, *DAMAGED) as error:
        reading.fault(where, getattr(error, "strerror", None) or str(error))
        return None
    around: dict[str, list[float]] = {}
    broken: set[str] = set()
    for number, item in enumerate(root.iter("object"), 1):
        names = [name.text.strip() for name in item.findall("name") if name.text]
        try:
            found = [_numbers(box, ("xmin", "ymin", "xmax", "ymax")) for box in item.findall("bndbox")]
        except ValueError as error:
            reading.fault(where, f"object {number}: {error}")
            broken.update(names)
            continue
        for x0, y0, x1, y1 in found:
            for name in names:
                box = around.setdefault(name, [x0, y0, x1, y1])
                box[:] = min(box[0], x0), min(box[1], y0), max(box[2], x1), max(box[3], y1)
    # A box around the other parts would be too small.
    return Boxes((size[0], size[1]), {name: box for name, box in around.items() if name not in broken})


def _root(path: Path) -> ElementTree.Element:
    """The root of an XML file; ValueError says what is wrong. Entities, which can grow without bounds, are refused."""
    data = path.read_bytes()
    if b"<!" in data.replace(b"<!--", b""):
        raise ValueError("expected XML without declarations")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError) as error:
        raise ValueError(f"expected XML: {error}") from error


def _numbers(parent: ElementTree.Element | None, names: tuple[str, ...]) -> list[float]:
    found = []
    for name in names:
        text = parent.findtext(name, "") if parent is not None else ""
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not is_number(number):
            raise ValueError(f'field "{name}": expected a number, got "{text[:80]}"')
        found.append(number)
    return found


def _sentences(folder: Path) -> Path:
    return folder if folder.name.lower() == "sentences" else folder / _first_there(folder, ("sentences", "Sentences"))


def _annotations(folder: Path) -> Path:
    beside = _sentences(folder).parent
    return beside / _first_there(beside, ("Annotations", "annotations"))


def _first_there(folder: Path, names: tuple[str, ...]) -> str:
    return next((name for name in names if (folder / name).is_dir()), names[0])
